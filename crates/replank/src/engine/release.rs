//! What a release says of itself, read at its pinned commit before there is a job: so that a refusal costs nothing, and a plan
//! knows what it speaks of. What the fetch finds later is judged again; nothing that is seen here stands for it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use replank_core::data::DataPlan;
use replank_core::fault::{Fault, Told};
use replank_core::mask::Masker;
use replank_core::phase::Fetched;
use replank_core::ports::{Clock, CommitsSeen, FileSeen, Peeked, Source};
use replank_core::record::{Deployment, Target};
use replank_core::words::{CommitSha, Millis, Version};
use serde::Deserialize as _;
use tokio::sync::{Semaphore, watch};

use super::candidates::FRESH_MS;
use super::setup::{Reading, Recipes};
use crate::config::manifest::{FILE, SIZE_MAX};

/// A start is acknowledged at once where the release was looked at before, which every look at the remote begins for the newest;
/// otherwise somebody waits who has clicked. The fetch reads the manifest again, so that nothing is lost by not waiting longer.
pub(super) const START_WAITS: Duration = Duration::from_secs(3);
/// Whoever asks for a plan wants to know what stands in the manifest. Below the 60 s of a request.
pub(super) const PLAN_WAITS: Duration = Duration::from_secs(30);
/// The whole of one look, whoever still waits for it.
const LOOK_MAX: Duration = Duration::from_secs(120);
/// Looks at the same time: each has a git of its own.
const AT_ONCE: usize = 2;
/// Commits that are remembered, with 200 lines and one manifest each: half a MiB in the worst case.
const KEPT_MAX: usize = 16;

type Key = (CommitSha, Option<CommitSha>);
type Looked = Arc<Result<Peeked, Told>>;
type Answer = watch::Receiver<Option<(Millis, Looked)>>;

/// The looks of this process: one at a time for each commit, which all who ask share. What was seen well is kept, since a commit
/// never changes; a failure for as long as one of the remote's is.
#[derive(Debug)]
pub(super) struct Looks {
    source: Arc<dyn Source>,
    clock: Arc<dyn Clock>,
    masker: Masker,
    turns: Arc<Semaphore>,
    kept: Mutex<VecDeque<(Key, Answer)>>,
}

impl Looks {
    pub(super) fn new(source: Arc<dyn Source>, clock: Arc<dyn Clock>, masker: Masker) -> Self {
        Self { source, clock, masker, turns: Arc::new(Semaphore::new(AT_ONCE)), kept: Mutex::default() }
    }

    /// Begins a look, or finds the one that was begun. Returns at once.
    pub(super) fn begin(&self, target: &Target, since: Option<&CommitSha>) -> Answer {
        let key = (target.commit.clone(), since.cloned());
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.clock.now();
        if let Some(at) = kept.iter().position(|(known, _)| *known == key) {
            let answer = &kept[at].1;
            let is_good = match answer.borrow().as_ref() {
                Some((seen, looked)) => looked.is_ok() || now.since(*seen) < FRESH_MS,
                // Under way, unless whoever looked is gone.
                None => answer.has_changed().is_ok(),
            };
            if is_good {
                return answer.clone();
            }
            kept.remove(at);
        }
        let (tell, answer) = watch::channel(None);
        kept.push_back((key, answer.clone()));
        if kept.len() > KEPT_MAX {
            kept.pop_front();
        }
        let (source, clock, turns) = (self.source.clone(), self.clock.clone(), self.turns.clone());
        let masker = self.masker.fresh();
        let (target, since) = (target.clone(), since.cloned());
        tokio::spawn(async move {
            let look = async {
                // Never closed: that it is, and a look without a turn, come to the same.
                let _turn = turns.acquire().await;
                source.peek(&target, since.as_ref(), FILE, SIZE_MAX).await
            };
            let late = || Fault::transient(format!("a look at the commit took longer than {} s", LOOK_MAX.as_secs()));
            let looked = tokio::time::timeout(LOOK_MAX, look).await.unwrap_or_else(|_| Err(late()));
            tell.send_replace(Some((clock.now(), Arc::new(looked.map_err(|fault| fault.told_with(&masker))))));
        });
        answer
    }

    /// The same, waited for.
    async fn seen(&self, target: &Target, since: Option<&CommitSha>, patience: Duration) -> Result<Looked, String> {
        let mut answer = self.begin(target, since);
        let seen = tokio::time::timeout(patience, answer.wait_for(Option::is_some)).await;
        let looked = match &seen {
            Ok(Ok(seen)) => seen.as_ref().map(|(_, looked)| looked.clone()),
            Ok(Err(_)) => return Err("the look at the commit was given up; ask again".to_owned()),
            Err(_) => None,
        };
        looked.ok_or_else(|| format!("the remote did not show the commit within {} s; ask again", patience.as_secs()))
    }
}

/// What is known of a release before it is fetched.
#[derive(Debug)]
pub(super) struct Release {
    pub(super) manifest: Word,
    /// Where they cannot be had: why.
    pub(super) commits: Result<CommitsSeen, String>,
}

#[derive(Debug)]
pub(super) enum Word {
    Read(Box<Reading>),
    /// It can never be built as it is.
    Unfit(Told),
    /// It is read after the fetch only: why.
    Unknown(String),
}

/// Looks at a release, and judges what it says by the operator's configuration.
pub(super) async fn read(
    looks: &Looks,
    recipes: &dyn Recipes,
    target: &Target,
    running: Option<&Deployment>,
    patience: Duration,
) -> Release {
    let looked = looks.seen(target, running.map(|running| &running.commit), patience).await;
    let looked = match looked.as_deref() {
        Ok(Ok(looked)) => looked,
        Ok(Err(told)) => return Release { manifest: Word::Unknown(told.sentence()), commits: Err(told.sentence()) },
        Err(why) => return Release { manifest: Word::Unknown(why.clone()), commits: Err(why.clone()) },
    };
    let judge = |manifest| match recipes.judge(manifest, &target.version, running) {
        Ok(reading) => Word::Read(Box::new(reading)),
        Err(fault) => Word::Unfit(fault.told()),
    };
    let manifest = match &looked.file {
        FileSeen::Absent => judge(None),
        FileSeen::Holds(bytes) => judge(Some(bytes)),
        FileSeen::Unfit(told) => Word::Unfit(told.clone()),
        FileSeen::Unknown(why) => Word::Unknown(why.clone()),
    };
    Release { manifest, commits: looked.commits.clone() }
}

/// Why a start of this release is refused; `None` where nothing is known that stands against it.
pub(super) fn refused(
    manifest: &Word,
    running: Option<&Deployment>,
    accept_one_way: bool,
    to: &Version,
) -> Option<Told> {
    match manifest {
        Word::Unknown(_) => None,
        Word::Unfit(told) => Some(told.clone()),
        Word::Read(reading) => match reading.refused(to) {
            Some(told) => Some(told),
            None => one_way(&reading.fetched, running, to).filter(|_| !accept_one_way),
        },
    }
}

/// The data part of a release's manifest, which was checked when it was read.
pub(super) fn data(fetched: &Fetched) -> DataPlan {
    DataPlan::deserialize(&fetched.manifest).unwrap_or_default()
}

/// Told before the click, and asked for with it: a release that closes the way back starts only for whoever said so.
pub(super) fn one_way(fetched: &Fetched, running: Option<&Deployment>, to: &Version) -> Option<Told> {
    let running = running?;
    let why = data(fetched).closes(&running.version)?;
    let what = format!("{to} closes the way back to {}: {why}", running.version);
    Some(Told::permanent(what, "make sure of a backup, then start it again with accept_one_way (--accept-one-way)"))
}
