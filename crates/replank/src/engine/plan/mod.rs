//! The plan of an upgrade: what is known without a job, put together. Nothing is changed, and a start looks at everything again.

mod differ;

use std::collections::BTreeSet;

use replank_core::data::StepKind;
use replank_core::event::Event;
use replank_core::history::Line;
use replank_core::image::{ImageId, Images};
use replank_core::mask::{Masker, mask_text_with};
use replank_core::outline::{self, Gap, Stage};
use replank_core::phase::{BuiltOnly, Fetched, Mode, Recipe, State};
use replank_core::ports::CommitSeen;
use replank_core::predict::{self, Kind, Spread};
use replank_core::record::{Actor, Job, OnRolloutFailure, Overlap, Plan, Record, Target};
use replank_core::transition::apply_as;
use replank_core::words::{ComponentName, ContainerName, Digest};
use serde_json::{Value, json};

use super::api::{Refusal, StartRequest};
use super::candidates::{Age, Wanted, Way, choose, wanted};
use super::commands::{LocalEngine, MISSED_REFS_MS, START_REFS_MS};
use super::planned::{
    Change, Check, Commit, Commits, Data, Downtime, PhaseTime, PlanRequest, PlannedContainer, PlannedImage,
    PlannedStep, Prediction, UpgradePlan,
};
use super::reconcile::describe;
use super::release::{self, PLAN_WAITS, Release, Word};
use super::room;
use crate::doctor::{Checked, Verdict};
use crate::plain;

/// The end of the history that predictions rest on: some thirty jobs of usual length.
const HISTORY_MAX: u64 = 2_000;
const PAGE: usize = 500;
/// Most changes that are listed.
const CHANGES_MAX: usize = 100;

/// A platform's plan with the release's word, and without.
struct Plans {
    with: Plan,
    without: Option<Plan>,
}

fn check(name: &str, verdict: &str, what: impl Into<String>, advice: impl Into<String>) -> Check {
    Check { name: name.to_owned(), verdict: verdict.to_owned(), what: what.into(), advice: advice.into() }
}

impl LocalEngine {
    /// Fails as a start would where there is no target to speak of; everything else that stands against it is in the plan.
    pub(super) async fn make_plan(&self, request: PlanRequest) -> Result<UpgradePlan, Refusal> {
        let start = StartRequest {
            target_version: request.target_version,
            target_sha: request.target_sha,
            build_only: request.build_only,
            accept_one_way: request.accept_one_way,
            confirm_downtime: true,
            ..StartRequest::default()
        };
        let wanted = wanted(&start)?;
        let record = self.load().await?.0;
        let mut checks = Vec::new();
        let target = self.planned_target(&wanted, &record, &mut checks).await?;
        let running = record.running.as_ref();
        let job = self.new_job(&Actor::system(), &start, target.clone())?;
        // By the transition itself: whatever it refuses, a start would be refused for.
        let event = Event::Start { job: Box::new(job.clone()), override_quarantine: request.override_quarantine };
        // What an earlier job made of this commit comes with it.
        let mut reuse = None;
        checks.push(match apply_as(&record, &event, self.ports.clock.now(), self.setup.reads_format) {
            Ok(begun) => {
                reuse = begun.record.job.and_then(|job| job.reuse);
                check("state", "ok", "a job may begin now, and the commit is not quarantined", "")
            }
            Err(refused) => check("state", "refused", refused.to_string(), ""),
        });
        let Some(looks) = &self.looks else {
            return Err(Refusal::Conflict("no remote is configured; set source.remote in replank.toml".to_owned()));
        };
        let release = release::read(looks, self.setup.recipes.as_ref(), &target, running, PLAN_WAITS);
        let (release, found, way_back, lines) = tokio::join!(
            release,
            room::look(self.setup.room.as_ref(), &record, &job),
            self.planned_way_back(&record),
            self.tail(&record)
        );
        checks.push(of_manifest(&release, &record, &job));
        checks.push(way_back);
        checks.extend(found.into_iter().map(of_room));
        let (fetched, unknown) = match &release.manifest {
            Word::Read(reading) => (Some(&reading.fetched), String::new()),
            Word::Unfit(told) => (None, told.sentence()),
            Word::Unknown(why) => (None, why.clone()),
        };
        let plans = match fetched {
            Some(fetched) if !job.build_only => self.plans(fetched, &target, &mut checks).await,
            Some(_) | None => None,
        };
        let predicted = predict::predict(&lines, Kind::of(&job));
        let serving = record.serving.as_ref().map(|serving| &serving.plan);
        let masker = Masker::new(&self.setup.secrets);
        let tell = |text: &str| tamed(&masker, text);
        let (changes, more_changes) = self.changes(fetched, plans.as_ref(), &record, &target, &tell);
        let notes = match &release.manifest {
            Word::Read(reading) => tell(&reading.notes),
            Word::Unfit(_) | Word::Unknown(_) => String::new(),
        };
        let containers = plans.as_ref().map(|plans| of_containers(serving, &plans.with)).unwrap_or_default();
        let refused = checks.iter().filter(|check| check.verdict == "refused").map(told).collect();
        Ok(UpgradePlan {
            from_version: running.map(|running| running.version.to_string()).unwrap_or_default(),
            from_sha: running.map(|running| running.commit.to_string()).unwrap_or_default(),
            to_version: target.version.to_string(),
            to_sha: target.commit.to_string(),
            build_only: job.build_only,
            mode: job.mode.name().to_owned(),
            confirm_window_seconds: if job.mode == Mode::BlueGreen && !job.build_only {
                self.setup.policy.budgets.confirm_window / 1_000
            } else {
                0
            },
            on_failure: on_failure(&job),
            refused,
            unknown,
            images: fetched.map(|fetched| of_images(fetched, reuse.as_ref())).unwrap_or_default(),
            steps: plans.as_ref().map(|plans| of_stages(serving, &plans.with, job.mode)).unwrap_or_default(),
            downtime: of_downtime(&containers, plans.is_some() || job.build_only, &predicted),
            containers,
            commits: of_commits(&release, &tell),
            notes,
            changes,
            more_changes,
            data: of_data(fetched, plans.as_ref(), &record, &job),
            checks,
            prediction: of_prediction(&predicted),
        })
    }

    /// As a start chooses it. Where the remote is away, what it offered in the last ten minutes can be started.
    async fn planned_target(
        &self,
        wanted: &Wanted,
        record: &Record,
        checks: &mut Vec<Check>,
    ) -> Result<Target, Refusal> {
        let remote = self.remote()?;
        if let (Wanted::Commit { sha }, Some(why)) = (wanted, remote.refuses_commits()) {
            return Err(Refusal::Conflict(format!("commit {} cannot be started: {why}", sha.short())));
        }
        let refs = match remote.refs(Age::Fresh).await {
            Ok(refs) => {
                checks.push(check("remote", "ok", format!("{} answers", remote.shown()), ""));
                refs
            }
            Err(told) => {
                let away = |_| Refusal::Unavailable(told.sentence());
                let refs = remote.refs(Age::Good(START_REFS_MS)).await.map_err(away)?;
                let what = format!("{}; the last good look is used, and the fetch needs the remote", told.what);
                checks.push(check("remote", "warning", what, told.advice.clone()));
                refs
            }
        };
        let own = self.setup.own_version.as_ref();
        let refusal = match choose(wanted, Way::Up, &refs, record, own) {
            Ok(target) => return Ok(target),
            Err(refusal) => refusal,
        };
        // What was just published may not be in the last look yet.
        match remote.refs(Age::Good(MISSED_REFS_MS)).await {
            Ok(refs) => choose(wanted, Way::Up, &refs, record, own),
            Err(_) => Err(refusal),
        }
    }

    /// Whether the images that would be the way back are there: without them the job fails before the swap.
    async fn planned_way_back(&self, record: &Record) -> Check {
        let Some(running) = &record.running else {
            return check("way_back", "ok", "nothing runs yet, so there is nothing to go back to", "");
        };
        let seen = futures_util::future::join_all(running.images.values().map(|image| self.find(image))).await;
        let those = |is_gone: bool| -> Vec<&str> {
            let which = seen.iter().filter(|image| !image.exists && image.error.is_none() == is_gone);
            which.map(|image| image.image_ref.as_str()).collect()
        };
        let (gone, unknown, version) = (those(true), those(false), &running.version);
        if !gone.is_empty() {
            let what =
                format!("an image of {version} is gone, and the job would fail before the swap: {}", gone.join(", "));
            check("way_back", "warning", what, "bring it back under this digest")
        } else if !unknown.is_empty() {
            let what = format!("it is not known whether the images of {version} are there: {}", unknown.join(", "));
            check("way_back", "warning", what, "look at the registry; the job needs them before the swap")
        } else {
            check("way_back", "ok", format!("the images of {version} are there, and will be protected"), "")
        }
    }

    /// The end of the history; without it nothing is predicted, and all else stands.
    pub(super) async fn tail(&self, record: &Record) -> Vec<Line> {
        let (mut lines, end) = (Vec::new(), record.history.count);
        let mut from = end.saturating_sub(HISTORY_MAX);
        while from < end {
            match self.ports.ledger.history(from, PAGE).await {
                Ok(page) if !page.is_empty() => {
                    from += page.len() as u64;
                    lines.extend(page);
                }
                Ok(_) => break,
                Err(error) => {
                    tracing::warn!(why = %describe(&error), "the history cannot be read for a prediction");
                    break;
                }
            }
        }
        lines
    }

    async fn plans(&self, fetched: &Fetched, target: &Target, checks: &mut Vec<Check>) -> Option<Plans> {
        let platform = self.ports.platform.as_ref()?;
        // A plan only asks which components there will be; what they will be built as is nobody's to know yet.
        let image = |name: String| ImageId::Engine { id: Digest::of(b"not built yet"), name };
        let images: Images = fetched.recipes.keys().map(|name| (name.clone(), image(name.to_string()))).collect();
        let with = match platform.plan(fetched, &images, &target.version).await {
            Ok(plan) => plan,
            Err(fault) => {
                let told = fault.told();
                let what = format!("the job would fail before the swap: {}", told.what);
                checks.push(check("run_spec", "warning", what, told.advice));
                return None;
            }
        };
        checks.push(check("run_spec", "ok", "how it would run is known, and every secret can be read", ""));
        let bare = Fetched { manifest: Value::Null, ..fetched.clone() };
        let without = platform.plan(&bare, &images, &target.version).await.ok();
        Some(Plans { with, without })
    }

    /// What would be other than it is: run specs against what was deployed; recipes, which no deployment records, against what
    /// the operator's configuration says.
    fn changes(
        &self,
        fetched: Option<&Fetched>,
        plans: Option<&Plans>,
        record: &Record,
        target: &Target,
        tell: &dyn Fn(&str) -> String,
    ) -> (Vec<Change>, usize) {
        let mut changes = Vec::new();
        let one = |(what, (from, to)): (String, (String, String)), by: &str| Change {
            what: tell(&what),
            from: tell(&from),
            to: tell(&to),
            by: by.to_owned(),
        };
        if let (Some(plans), Some(serving)) = (plans, &record.serving) {
            let whole = |plan: &Plan| json!({ "containers": plan.spec["containers"], "listeners": plan.spec["listeners"], "data": plan.data });
            let (old, new) = (whole(&serving.plan), whole(&plans.with));
            let of_release = plans.without.as_ref().map(|without| differ::differences(&whole(without), &new));
            let is_release = |what: &String| of_release.as_ref().is_some_and(|of| of.contains_key(what));
            for change in differ::differences(&old, &new) {
                let by = if is_release(&change.0) { "release" } else { "operator" };
                changes.push(one(change, by));
            }
        }
        if let Some(fetched) = fetched
            && let Ok(own) = self.setup.recipes.judge(None, &target.version, record.running.as_ref())
        {
            let (own, wished) = (json!(own.fetched.recipes), json!(fetched.recipes));
            let built = differ::differences(&own, &wished).into_iter();
            changes.extend(built.map(|(what, values)| one((format!("components.{what}"), values), "release")));
        }
        let more = changes.len().saturating_sub(CHANGES_MAX);
        changes.truncate(CHANGES_MAX);
        (changes, more)
    }
}

/// Masked, and in lines that neither a terminal nor a page obeys.
fn tamed(masker: &Masker, text: &str) -> String {
    mask_text_with(masker, text).lines().map(|line| plain::line(line, false)).collect::<Vec<_>>().join("\n")
}

fn told(check: &Check) -> String {
    if check.advice.is_empty() { check.what.clone() } else { format!("{}; {}", check.what, check.advice) }
}

fn of_manifest(release: &Release, record: &Record, job: &Job) -> Check {
    let (running, to) = (record.running.as_ref(), &job.target.version);
    match (release::refused(&release.manifest, running, job.accepts_one_way(), to), &release.manifest) {
        (Some(told), _) => check("release", "refused", told.what, told.advice),
        (None, Word::Unknown(why)) => {
            let what = format!("what the release says of itself is not known yet: {why}");
            check(
                "release",
                "warning",
                what,
                "ask again, or start: the fetch reads it, and refuses before anything is built",
            )
        }
        (None, Word::Read(_) | Word::Unfit(_)) => {
            check("release", "ok", "its manifest can be used here, and what it requires is there", "")
        }
    }
}

fn of_room(found: Checked) -> Check {
    // A start does not wait for these looks, so they refuse none: the job itself makes them first.
    let lacks = room::lacks(&found).map(|told| format!("the job would fail before anything is built: {}", told.what));
    let verdict = match found.finding.verdict {
        Verdict::Ok => "ok",
        Verdict::Warning | Verdict::Failed => "warning",
    };
    check(found.name, verdict, lacks.unwrap_or(found.finding.what), found.finding.advice)
}

fn on_failure(job: &Job) -> Vec<String> {
    let mut told = vec!["before the swap nothing that runs is touched".to_owned()];
    if job.build_only {
        return told;
    }
    if job.mode == Mode::BlueGreen {
        told.push(
            "until the cut-over the old version serves; inside the confirm window traffic goes back by itself"
                .to_owned(),
        );
    }
    told.push(match job.on_rollout_failure {
        OnRolloutFailure::Hold => "a rollout that fails is held as it stands, for a person to decide".to_owned(),
        OnRolloutFailure::Rollback => {
            "a rollout that fails is rolled back by itself, as long as the way back is open".to_owned()
        }
    });
    told
}

fn of_images(fetched: &Fetched, made: Option<&BuiltOnly>) -> Vec<PlannedImage> {
    let one = |(component, recipe): (&ComponentName, &Recipe)| PlannedImage {
        component: component.to_string(),
        dockerfile: recipe.dockerfile.clone(),
        context: recipe.context.clone(),
        reused: made.is_some_and(|made| made.image(component, recipe).is_some()),
    };
    fetched.recipes.iter().map(one).collect()
}

fn of_stages(from: Option<&Plan>, to: &Plan, mode: Mode) -> Vec<PlannedStep> {
    let step = |kind: &str, containers: Vec<String>, what: &str| PlannedStep {
        kind: kind.to_owned(),
        containers,
        what: what.to_owned(),
    };
    let names = |names: BTreeSet<ContainerName>| names.iter().map(ToString::to_string).collect::<Vec<_>>();
    let one = |stage: Stage| match stage {
        Stage::Data(data) => {
            let what = match data.kind {
                StepKind::Backup => "runs once, on the images that run now",
                StepKind::Migrate => "runs once, on the new images",
            };
            step("data", vec![data.name.to_string()], what)
        }
        Stage::StopOld(stop) => step("stop", names(stop), "old; they may not run beside their successors"),
        Stage::StartNew(start) => {
            step("start", names(start), "new, side by side as far as they do not wait for one another")
        }
        Stage::Prove => step("prove", vec![], "the new version answers, several times in a row"),
        Stage::CutOver => step("cut_over", vec![], "traffic goes to the new version"),
        Stage::HandOver => step("hand_over", vec![], "the new version's controller drives"),
        Stage::StopOldLate(stop) => step("stop", names(stop), "old, which ran until the cut-over"),
        Stage::StartNewLate(start) => step("start", names(start), "new, after the old ones have stopped"),
        Stage::Confirm => step("confirm", vec![], "the old version stays warm"),
        Stage::Retire(stop) => step("retire", names(stop), "old; stopped, and kept for a while"),
    };
    outline::stages(from, to, mode).into_iter().map(one).collect()
}

fn of_containers(from: Option<&Plan>, to: &Plan) -> Vec<PlannedContainer> {
    let fates = outline::fates(from, to);
    let one = |(name, fate): (ContainerName, outline::Fate)| PlannedContainer {
        name: name.to_string(),
        overlap: match fate.overlap {
            Overlap::Allowed => "allowed",
            Overlap::StopOldFirst => "stop_old_first",
            Overlap::StartAfterCutover => "start_after_cutover",
        }
        .to_owned(),
        change: match (fate.goes, fate.is_new) {
            (true, _) => "removed",
            (false, true) => "new",
            (false, false) => "kept",
        }
        .to_owned(),
        gap: match fate.gap {
            Gap::None => "none",
            Gap::Early => "before_cutover",
            Gap::Late => "after_cutover",
            Gap::Long => "across_cutover",
        }
        .to_owned(),
    };
    fates.into_iter().map(one).collect()
}

/// Zero where everything overlaps; what past jobs say otherwise, the longer of the two gaps where there are both.
fn of_downtime(containers: &[PlannedContainer], is_known: bool, past: &predict::Prediction) -> Downtime {
    let with = |gap: &str| containers.iter().any(|container| container.gap == gap);
    let of = |which: fn(Spread) -> u64| -> Option<u64> {
        let early = if with("before_cutover") { past.early_gap.map(which) } else { Some(0) };
        let late = if with("after_cutover") { past.late_gap.map(which) } else { Some(0) };
        // From before the start until after the cut-over: no past gap is like it.
        let is_told = is_known && !with("across_cutover");
        Some(early?.max(late?)).filter(|_| is_told)
    };
    let names = containers.iter().filter(|container| container.gap != "none").map(|container| container.name.clone());
    Downtime { containers: names.collect(), p50_ms: of(|spread| spread.p50), p90_ms: of(|spread| spread.p90) }
}

fn of_commits(release: &Release, tell: &dyn Fn(&str) -> String) -> Commits {
    match &release.commits {
        Err(why) => Commits { list: vec![], more: false, unknown: why.clone() },
        Ok(seen) => {
            let one = |commit: &CommitSeen| Commit {
                sha: commit.id.to_string(),
                author: tell(&commit.author),
                at: commit.at.rfc3339(),
                subject: tell(&commit.subject),
            };
            Commits { list: seen.commits.iter().map(one).collect(), more: seen.more, unknown: String::new() }
        }
    }
}

fn of_data(fetched: Option<&Fetched>, plans: Option<&Plans>, record: &Record, job: &Job) -> Data {
    let data = fetched.map(release::data).unwrap_or_default();
    let closes = record.running.as_ref().and_then(|running| data.closes(&running.version)).unwrap_or_default();
    let steps = plans.map(|plans| plans.with.data.steps.iter().map(|step| step.name.to_string()).collect());
    let rollback = match &record.running {
        _ if job.build_only => "nothing: what runs is not touched".to_owned(),
        None => "there is nothing to go back to".to_owned(),
        Some(running) if closes.is_empty() => {
            format!("neither the remote nor a build: the images of {} are protected until then", running.version)
        }
        Some(running) => {
            format!("the data of {} restored by a person first, then --data-restored", running.version)
        }
    };
    let schema = serde_json::to_value(data.schema).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default();
    Data { steps: steps.unwrap_or_default(), schema, closes, rollback }
}

fn of_prediction(past: &predict::Prediction) -> Prediction {
    let phase = |(state, spread): &(State, Option<Spread>)| PhaseTime {
        phase: state.name().to_owned(),
        p50_ms: spread.map(|spread| spread.p50),
        p90_ms: spread.map(|spread| spread.p90),
    };
    Prediction {
        jobs: past.jobs,
        phases: past.phases.iter().map(phase).collect(),
        total_p50_ms: past.total.map(|spread| spread.p50),
        total_p90_ms: past.total.map(|spread| spread.p90),
    }
}
