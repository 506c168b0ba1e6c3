//! How a fault is armed and how it strikes exactly once, whichever controller comes to it first: files in its home.
//!
//! A process cannot send itself SIGKILL where it is the first of its container, and a kill from inside would not be one: the
//! process says where it stands and waits there, and whoever armed the fault kills or stops it from outside.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use replank_core::fault::Class;
use replank_core::phase::State;
use replank_core::record::Record;
use serde::{Deserialize, Serialize};

use crate::point::{Effect, Point, Side, Step};

/// The directory of these files, in the home of the installation.
pub const DIRECTORY: &str = "faults";
/// The fault that is to strike next.
pub const ARMED: &str = "armed.json";
/// The same after it struck.
pub const STRUCK: &str = "struck.json";
/// Who stands at it.
pub const AT: &str = "at.json";
/// Whoever was stopped may go on.
pub const GO: &str = "go";
/// Every step that was come to, one a line, since the file was made: by whichever controller.
pub const TRACE: &str = "trace";

const LOOK_EVERY: Duration = Duration::from_millis(2);

/// Who stands at a fault.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct At {
    /// The revision whose controller it is.
    pub controller: String,
    pub point: Point,
    /// The state of the row as that controller saw it last.
    pub phase: State,
}

/// One controller's way past the fault points.
#[derive(Debug, Clone)]
pub struct Gate {
    directory: PathBuf,
    controller: String,
    phase: Arc<Mutex<State>>,
}

impl Gate {
    pub fn new(home: &Path, controller: &str) -> Self {
        Self {
            directory: home.join(DIRECTORY),
            controller: controller.to_owned(),
            phase: Arc::new(Mutex::new(State::Idle)),
        }
    }

    /// What the controller knows of the record now.
    pub fn saw(&self, record: &Record) {
        let state = record.phase.state();
        *self.phase.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }

    /// Whether a fault is armed for after this step.
    pub fn waits_behind(&self, step: &str) -> bool {
        let armed = self.armed();
        armed.is_some_and(|point| point.side == Side::After && point.step.0 == step)
    }

    fn armed(&self) -> Option<Point> {
        serde_json::from_slice(&fs::read(self.directory.join(ARMED)).ok()?).ok()
    }

    /// Comes past one side of a step. An error is the fault that strikes there.
    pub async fn pass(&self, step: &str, side: Side) -> Result<(), Class> {
        self.trace(step, side);
        let Some(point) = self.armed() else { return Ok(()) };
        if point.side != side || point.step != Step(step.to_owned()) {
            return Ok(());
        }
        let passed = fs::read_to_string(self.directory.join(TRACE)).unwrap_or_default();
        let here = line(step, side);
        if of_the_job(&passed).filter(|one| *one == here).count() < point.nth {
            return Ok(());
        }
        // Whoever moves the file is the one that is struck.
        if fs::rename(self.directory.join(ARMED), self.directory.join(STRUCK)).is_err() {
            return Ok(());
        }
        let effect = point.effect;
        let phase = *self.phase.lock().unwrap_or_else(PoisonError::into_inner);
        let at = At { controller: self.controller.clone(), point, phase };
        let next = self.directory.join("at.next");
        let told = serde_json::to_vec(&at).map_err(std::io::Error::from).and_then(|text| fs::write(&next, text));
        // Nothing can be tested where this fails, and the other side says so when its patience is over.
        if let Err(error) = told.and_then(|()| fs::rename(&next, self.directory.join(AT))) {
            eprintln!("the fault cannot be told: {error}");
        }
        match effect {
            Effect::Kill => std::future::pending().await,
            Effect::Stop => {
                while !self.directory.join(GO).exists() {
                    tokio::time::sleep(LOOK_EVERY).await;
                }
                Ok(())
            }
            Effect::Transient => Err(Class::Transient),
            Effect::Permanent => Err(Class::Permanent),
            Effect::Conflict => Err(Class::Conflict),
            Effect::Indeterminate => Err(Class::Indeterminate),
        }
    }

    fn trace(&self, step: &str, side: Side) {
        // Made by whoever wants it; one short line is written at once or not at all.
        let Ok(mut file) = fs::OpenOptions::new().append(true).open(self.directory.join(TRACE)) else { return };
        if let Err(error) = file.write_all(format!("{}\n", line(step, side)).as_bytes()) {
            eprintln!("the trace cannot be written: {error}");
        }
    }
}

/// The lines of a trace from the job's first one on. What the job before it left to be tidied up may be among those before.
pub fn of_the_job(trace: &str) -> impl Iterator<Item = &str> {
    const FIRST: [&str; 2] = ["before record start", "before record rollback_start"];
    trace.lines().skip_while(|line| !FIRST.contains(line))
}

fn line(step: &str, side: Side) -> String {
    let side = match side {
        Side::Before => "before",
        Side::After => "after",
    };
    format!("{side} {step}")
}
