//! How long an upgrade will take, by those that went before: read from the lines of the history, with no number where there
//! are too few to mean anything.

use crate::history::{Entry, Line};
use crate::phase::{Mode, Op, State};
use crate::record::Job;
use crate::words::Millis;

/// Fewer durations than this are anecdotes: nothing is said then.
pub const SAMPLES_MIN: usize = 3;
/// Older jobs than so many matching ones say more about the past than about the next one.
pub const JOBS_MAX: usize = 20;

/// What has to be alike for one job to tell something of another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Kind {
    pub mode: Mode,
    pub build_only: bool,
}

impl Kind {
    pub fn of(job: &Job) -> Self {
        Self { mode: job.mode, build_only: job.build_only }
    }

    /// The phases that a job of this kind goes through when all goes well.
    pub fn phases(self) -> &'static [State] {
        const ALL: [State; 7] = [
            State::Queued,
            State::Fetching,
            State::Building,
            State::Patching,
            State::RollingOut,
            State::Validating,
            State::Confirming,
        ];
        match (self.build_only, self.mode) {
            (true, Mode::Single | Mode::BlueGreen) => &ALL[..3],
            (false, Mode::Single) => &ALL[..5],
            (false, Mode::BlueGreen) => &ALL,
        }
    }
}

/// A job that succeeded, in milliseconds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Done {
    pub kind: Kind,
    /// In the order in which they were entered.
    pub phases: Vec<(State, u64)>,
    pub total: u64,
    /// From the recorded stop of what may not overlap to the sight of its successors; absent where nothing had to stop.
    pub early_gap: Option<u64>,
    /// The same of what changes places after the cut-over.
    pub late_gap: Option<u64>,
}

/// Half of the durations were at most `p50`, nine tenths at most `p90`: both are durations that were measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Spread {
    pub p50: u64,
    pub p90: u64,
}

impl Spread {
    /// By nearest rank. `None` below [`SAMPLES_MIN`].
    pub fn of(mut durations: Vec<u64>) -> Option<Self> {
        durations.sort_unstable();
        let rank = |percent: usize| durations.get((durations.len() * percent).div_ceil(100).saturating_sub(1)).copied();
        if durations.len() < SAMPLES_MIN {
            return None;
        }
        Some(Self { p50: rank(50)?, p90: rank(90)? })
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prediction {
    /// How many jobs it rests on.
    pub jobs: usize,
    /// Every phase of the kind, in order.
    pub phases: Vec<(State, Option<Spread>)>,
    pub total: Option<Spread>,
    pub early_gap: Option<Spread>,
    pub late_gap: Option<Spread>,
}

/// What the newest [`JOBS_MAX`] jobs of this kind tell, of a part of the history that ends now.
pub fn predict(lines: &[Line], kind: Kind) -> Prediction {
    let jobs: Vec<Done> = done(lines).into_iter().rev().filter(|job| job.kind == kind).take(JOBS_MAX).collect();
    let spread = |of: &dyn Fn(&Done) -> Option<u64>| Spread::of(jobs.iter().filter_map(of).collect());
    let of_phase = |state: State| {
        let took = |job: &Done| job.phases.iter().find(|(phase, _)| *phase == state).map(|(_, took)| *took);
        spread(&took)
    };
    Prediction {
        jobs: jobs.len(),
        phases: kind.phases().iter().map(|state| (*state, of_phase(*state))).collect(),
        total: spread(&|job| Some(job.total)),
        early_gap: spread(&|job| job.early_gap),
        late_gap: spread(&|job| job.late_gap),
    }
}

/// The jobs that succeeded, oldest first: those whose beginning is among the lines.
pub fn done(lines: &[Line]) -> Vec<Done> {
    let (mut all, mut open) = (Vec::new(), None::<Open>);
    for entry in lines.iter().filter_map(Entry::read) {
        if entry.event() == "start" {
            open = Open::begin(&entry);
        } else if let Some(job) = open.as_mut().filter(|job| job.id == entry.job()) {
            match job.goes_on(&entry) {
                On::Goes => {}
                On::Ends(ended) => {
                    all.extend(ended);
                    open = None;
                }
            }
        }
    }
    all
}

enum On {
    Goes,
    /// With what it tells, where it succeeded.
    Ends(Option<Done>),
}

/// A job in the middle of its lines.
struct Open {
    id: String,
    /// As the first line says it; older ones say nothing.
    mode: Option<Mode>,
    begun: Millis,
    at: (State, Millis),
    phases: Vec<(State, u64)>,
    stops: [Option<Millis>; 2],
    gaps: [Option<u64>; 2],
}

/// What stops, and what is started in its place: early and late.
const CHANGES: [(Op, Op); 2] = [(Op::StopOld, Op::StartNew), (Op::StopOldLate, Op::StartNewLate)];

impl Open {
    fn begin(start: &Entry) -> Option<Self> {
        let begun = start.at()?;
        let mode = [Mode::Single, Mode::BlueGreen].into_iter().find(|mode| mode.name() == start.text("mode"));
        let (id, at) = (start.job().to_owned(), (start.state()?, begun));
        Some(Self { id, mode, begun, at, phases: Vec::new(), stops: [None; 2], gaps: [None; 2] })
    }

    fn goes_on(&mut self, entry: &Entry) -> On {
        let Some(now) = entry.at() else { return On::Goes };
        for (index, (stop, start)) in CHANGES.into_iter().enumerate() {
            match entry.event() {
                // The first stop counts, and the last start: an attempt in between is part of the gap.
                "intended" if entry.text("op") == stop.name() => _ = self.stops[index].get_or_insert(now),
                "observed" if entry.text("op") == start.name() => {
                    self.gaps[index] = self.stops[index].map(|stopped| now.since(stopped));
                }
                _ => {}
            }
        }
        let Some(state) = entry.state() else { return On::Goes };
        let (left, since) = std::mem::replace(&mut self.at, (state, now));
        self.phases.push((left, now.since(since)));
        if state.in_flight() {
            return On::Goes;
        }
        On::Ends((state == State::Succeeded).then(|| self.done(entry.is("build_only"), now)))
    }

    fn done(&mut self, build_only: bool, now: Millis) -> Done {
        let phases = std::mem::take(&mut self.phases);
        let confirmed = phases.iter().any(|(state, _)| *state == State::Confirming);
        let mode = self.mode.unwrap_or(if confirmed { Mode::BlueGreen } else { Mode::Single });
        let [early_gap, late_gap] = self.gaps;
        Done { kind: Kind { mode, build_only }, phases, total: now.since(self.begun), early_gap, late_gap }
    }
}
