//! Data steps: the first act of a rollout, each once.

use super::task::data_step;
use super::{Action, Decision, Ended, Outcome, Pause, View, over};
use crate::data::{DataStep, StepKind};
use crate::event::Event;
use crate::fault::{Class, Told};
use crate::phase::Swap;
use crate::record::Job;
use crate::words::Millis;

/// What the platform may take beyond a step's own time to say that it has ended it.
const GRACE: u64 = 60_000;

/// The next thing that a swap's data steps need; `None` once they are done.
pub(super) fn decide(view: &View<'_>, swap: &Swap, job: &Job) -> Option<Decision> {
    let is_done = |step: &&DataStep| job.data.get(&step.name).is_some_and(|state| state.ended_at.is_some());
    let step = swap.to.plan.data.steps.iter().find(|step| !is_done(step))?;
    let name = &step.name;
    let Some(state) = job.data.get(name) else {
        return Some(Decision::Record(Event::StepIntended { step: name.clone() }));
    };
    let task = view.task(&data_step(name), 1);
    let until = state.intended_at.plus(step.budget);
    if let Some(Ended::Well { outcome: Outcome::Stepped { exit_code }, .. }) = view.tasks.ended.get(&task) {
        return Some(Decision::Record(match exit_code {
            0 => Event::StepDone { step: name.clone() },
            code => Event::Failed { fault: failed(swap, step, &format!("{name} ended with exit code {code}")) },
        }));
    }
    Some(match view.pause(&task) {
        Pause::GaveUp(told) => Decision::Record(Event::Failed { fault: failed(swap, step, &told.what) }),
        _ if view.now >= until.plus(GRACE) => {
            over(view, step.budget, &so_far(swap, step, &format!("{name} did not end")), advice(step))
        }
        Pause::None => {
            let key = job.key(&data_step(name), 1);
            Decision::Act(Action::Step { step: name.clone(), key, until })
        }
        Pause::Running => Decision::Wait { until: Some(until.plus(GRACE)), why: format!("{name} is under way") },
        Pause::Until(at, told) => Decision::Wait { until: Some(at.min(until.plus(GRACE))), why: told.what },
    })
}

/// Since when the rollout's own clocks count.
pub(super) fn since(view: &View<'_>, job: &Job) -> Millis {
    crate::data::ended_at(job).unwrap_or(view.record.entered_at).max(view.record.entered_at)
}

/// The job ends as a failed rollout also where its first act failed: what that means for users is said beside it.
fn so_far(swap: &Swap, step: &DataStep, what: &str) -> String {
    match (step.kind, &swap.from) {
        (StepKind::Backup, Some(from)) => format!("{what}; nothing was changed, and {} serves", from.version),
        (StepKind::Backup, None) | (StepKind::Migrate, _) => what.to_owned(),
    }
}

fn failed(swap: &Swap, step: &DataStep, what: &str) -> Told {
    Told { class: Class::Permanent, what: so_far(swap, step, what), advice: advice(step).to_owned() }
}

fn advice(step: &DataStep) -> &'static str {
    match step.kind {
        StepKind::Backup => "read its log, mend the cause, and start again: nothing was changed",
        StepKind::Migrate => {
            "read its log and look at the data: what it did before it failed is not undone; it is not run again by itself"
        }
    }
}
