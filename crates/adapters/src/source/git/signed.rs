//! Who signed the tag of a clone on this machine: the operator's keys are laid out beside it, and git is asked.

use std::ffi::OsStr;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use replank_core::fault::Fault;
use replank_core::ports::{Clock, Log, Progress, Stream};

use super::child::{self, Ended, Run};
use super::clone::Fetch;
use super::verify::Verify;
use crate::source::signed::{Said, TAG_MAX, WORDS_MAX, judge, lightweight, unusable};

impl Verify {
    /// Whether the keys and the programs are there at all.
    pub(super) fn check(&self, clock: Option<&dyn Clock>) -> Result<(), Fault> {
        match self {
            Self::SignedTags(signers) => signers.check(OsStr::new(child::PATH), time(clock)?).map_err(unusable),
            Self::Nothing | Self::SignedElsewhere => Ok(()),
        }
    }
}

fn time(clock: Option<&dyn Clock>) -> Result<SystemTime, Fault> {
    let clock = clock.ok_or_else(|| {
        Fault::permanent("signatures cannot be checked without a clock, as nobody can say which keys have ended")
            .advice("this is a defect of Replank: report it")
    })?;
    Ok(SystemTime::UNIX_EPOCH + Duration::from_millis(u64::try_from(clock.now().0).unwrap_or_default()))
}

/// What git and its helpers write, kept.
#[derive(Default)]
struct Words(Mutex<Vec<u8>>);

impl Log for Words {
    fn write(&self, _: Stream, bytes: &[u8]) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let room = WORDS_MAX.saturating_sub(kept.len());
        kept.extend_from_slice(&bytes[..bytes.len().min(room)]);
    }
    fn progress(&self, _: Progress) {}
}

impl Fetch<'_> {
    /// The signer of the tag in a clone; `None` where nobody asks. Looked at each time, also in a clone that was there before:
    /// a key may have been taken out since.
    pub(super) async fn signer(&self, src: &Path, home: &Path) -> Result<Option<String>, Fault> {
        let Verify::SignedTags(signers) = &self.source.verify else { return Ok(None) };
        let raw_ref = &self.target.raw_ref;
        let ask = async |args: &[&str]| self.ask_git(args, src, home, TAG_MAX).await;
        let object = ask(&["rev-parse", "--verify", raw_ref]).await?;
        let object = String::from_utf8_lossy(&object);
        let object = object.trim();
        if ask(&["cat-file", "-t", object]).await?.trim_ascii() != b"tag" {
            return Err(Fault::permanent(lightweight(&self.target.version.tag()))
                .advice("ask the release's maintainer for a signed tag; nothing was built"));
        }
        let bytes = ask(&["cat-file", "tag", object]).await?;
        let ready =
            signers.prepare(home, OsStr::new(child::PATH), time(self.source.clock.as_deref())?).map_err(unusable)?;
        let mut config = self.local_config(src);
        for (key, value) in &ready.settings {
            let value = value.to_str().ok_or_else(|| Fault::permanent("the work directory's path is not UTF-8"))?;
            config.push(((*key).to_owned(), value.to_owned()));
        }
        let words = Words::default();
        let run = Run {
            git: &self.source.git,
            // By the object's own id: a name could mean another one by then.
            args: &["verify-tag", "--raw", object],
            cwd: src,
            home,
            config: &config,
            time: self.source.limits.local_time,
            disk: None,
            capture: Some(TAG_MAX),
        };
        let is_good = match run.go(&words).await? {
            Ended::Fine(_) => true,
            // A helper that does not read a damaged signature to its end kills git by the pipe between them, now and then.
            Ended::Failed { .. } => false,
            Ended::TimedOut | Ended::DiskFull | Ended::TooMuch => {
                return Err(Fault::transient("git verify-tag took too long or said too much"));
            }
            Ended::Lost(error) => return Err(Fault::transient("git verify-tag was lost").because(error)),
        };
        let words = words.0.into_inner().unwrap_or_else(PoisonError::into_inner);
        let said = Said { object: &bytes, is_good, words: &String::from_utf8_lossy(&words) };
        let signer = judge(self.target, &said, &ready.unfit)?;
        self.say(&format!("the tag is signed by {signer}\n"));
        Ok(Some(signer))
    }
}
