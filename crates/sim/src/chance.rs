//! Chance from one seed: which release is how bad, which call fails how, who dies when.

use std::time::Duration;

use replank_core::fault::Class;

/// What a port call comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    Well,
    /// It fails, and nothing was done.
    Refused(Class),
    /// It is done, and its answer is lost.
    Lost,
    /// Its answer is lost, and it is done when nobody expects it any more.
    Late(Duration),
    /// The process dies before it is done, or after.
    Killed {
        done: bool,
    },
    /// It never comes back.
    Hangs,
}

/// How bad the world is: each a chance in 10,000 for one call.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rates {
    pub refused: u32,
    pub lost: u32,
    pub late: u32,
    pub killed: u32,
    pub paused: u32,
    pub hangs: u32,
}

impl Rates {
    pub(crate) const CALM: Rates = Rates { refused: 0, lost: 0, late: 0, killed: 0, paused: 0, hangs: 0 };

    /// Some worlds are calm and some are hell; most have one kind of trouble that is worse than the others.
    pub(crate) fn draw(rng: &mut fastrand::Rng) -> Rates {
        let mut one = |most: u32| match rng.u32(0..4) {
            0 => 0,
            1 => most / 20,
            2 => most / 4,
            _ => most,
        };
        Rates { refused: one(1_500), lost: one(800), late: one(600), killed: one(60), paused: one(40), hangs: one(100) }
    }
}

/// What a call can do to the world: a look has no effect that could be lost or late.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Look,
    Effect,
    /// A commit or a heartbeat: thousands of them happen where one change does.
    Frequent,
}

pub(crate) fn fate(rng: &mut fastrand::Rng, rates: &Rates, kind: Kind) -> Fate {
    // What is called a hundred times as often is given a tenth of the trouble, or nothing would ever get done.
    let scale = match kind {
        Kind::Effect => 1,
        Kind::Look => 4,
        Kind::Frequent => 20,
    };
    let mut hit = |rate: u32| rate > 0 && rng.u32(0..10_000 * scale) < rate;
    if hit(rates.refused) {
        let classes = [Class::Transient, Class::Permanent, Class::Conflict, Class::Indeterminate];
        // What fails for good ends a job: rarer, or no job would get far.
        let class = classes[[0, 0, 0, 0, 2, 2, 3, 3, 1][rng.usize(0..9)]];
        return Fate::Refused(class);
    }
    if kind != Kind::Look && hit(rates.lost) {
        return Fate::Lost;
    }
    if kind != Kind::Look && hit(rates.late) {
        return Fate::Late(Duration::from_millis(rng.u64(10..90_000)));
    }
    if hit(rates.killed) {
        return Fate::Killed { done: rng.bool() };
    }
    if kind == Kind::Effect && hit(rates.hangs) {
        return Fate::Hangs;
    }
    Fate::Well
}

/// How a release behaves once it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Health {
    Good,
    /// Answers after a while.
    Slow(u64),
    /// Starts and never answers.
    Never,
    /// Stops answering so many milliseconds after it first got traffic.
    Degrades(u64),
    /// Its web container ends by itself at so many of its starts.
    Crashes(u32),
    /// It answers now and then.
    Flickers,
}

impl Health {
    pub(crate) fn draw(rng: &mut fastrand::Rng) -> Self {
        match rng.u32(0..16) {
            0 => Self::Never,
            1 => Self::Degrades(rng.u64(0..40_000)),
            2 => Self::Crashes(rng.u32(1..6)),
            3 => Self::Flickers,
            4 | 5 => Self::Slow(rng.u64(1_000..100_000)),
            _ => Self::Good,
        }
    }
}
