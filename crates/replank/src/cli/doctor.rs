//! `replank doctor` as it is typed, and what it tells.

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde_json::json;

use super::commands::{Done, Run};
use super::failure::Code;
use crate::doctor::{Checked, Patient, Verdict, examine};
use crate::plain;

pub const HELP: &str = "\
Each check ends ok, with a warning, or failed, and says what to do. Nothing is changed: an
upload that is begun to see whether the registry takes it is given up, and no ledger is made.

Run it where the work is done: what the host can reach and read, the controller may not, and
the other way round. In a deployed controller: docker exec CONTROLLER replank doctor

Exit codes:
  0    nothing failed; there may be warnings
  1    a check failed
  2    the configuration is wrong

Examples:
  replank doctor --config /srv/shop/replank.toml
  replank doctor --json | jq '.checks[] | select(.verdict != \"ok\")'";

#[derive(Debug, Args)]
pub struct Doctor {
    /// Longest time for each check; all of them run at once
    #[arg(long, value_name = "SECONDS", default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=600))]
    pub timeout: u64,
}

impl Run<'_> {
    pub(super) async fn doctor(&self, args: Doctor) -> Done {
        let settings = self.settings()?;
        let patient = Patient { settings: &settings, env: self.env };
        let checks = examine(patient, Duration::from_secs(args.timeout)).await;
        let count = |verdict| checks.iter().filter(|check| check.finding.verdict == verdict).count();
        let (failed, warnings) = (count(Verdict::Failed), count(Verdict::Warning));
        let shown = json!({ "ok": failed == 0, "failed": failed, "warnings": warnings, "checks": checks });
        self.print(&shown, |out, style| {
            for check in &checks {
                tell(out, style, check)?;
            }
            writeln!(out, "\n{}", summary(failed, warnings))
        })?;
        Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::from(Code::Failed as u8) })
    }
}

fn tell(out: &mut dyn std::io::Write, style: &super::show::Style, check: &Checked) -> std::io::Result<()> {
    let word = match check.finding.verdict {
        Verdict::Ok => style.good("ok     "),
        Verdict::Warning => style.busy("warning"),
        Verdict::Failed => style.bad("failed "),
    };
    writeln!(out, "{word}  {:<8}  {}", check.name, plain::line(&check.finding.what, false))?;
    if !check.finding.advice.is_empty() {
        writeln!(out, "{:19}→ {}", "", plain::line(&check.finding.advice, false))?;
    }
    Ok(())
}

fn summary(failed: usize, warnings: usize) -> String {
    let of = |n, one| super::show::count(n, one);
    match (failed, warnings) {
        (0, 0) => "all is well".to_owned(),
        (0, n) => format!("nothing failed; {}", of(n, "warning")),
        (n, m) => format!("{} failed; {}", of(n, "check"), of(m, "warning")),
    }
}
