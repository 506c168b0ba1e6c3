//! What a run leaves on an engine that is not its own, and its removal: everything else there stays as it is.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use anyhow::Result;

use crate::cleanup::{self, CleanUp};
use crate::installed::APPLICATION;
use crate::{Engine, images};

/// Controllers go on while they are removed, and make and remove things too.
const ROUNDS: usize = 5;

/// Kinds of things: how they are listed, where their labels stand, and how they are removed.
const KINDS: [(&[&str], &str, &[&str]); 3] = [
    (&["ps", "--all", "--quiet"], ".Config.Labels", &["rm", "--force", "--volumes"]),
    (&["network", "ls", "--quiet"], ".Labels", &["network", "rm"]),
    (&["images", "--quiet"], ".Config.Labels", &["rmi", "--force"]),
];

/// Removes what came after it, when it is dropped or the process ends by a signal: installations of the sample that were not
/// there before, with their containers, networks and images, and the testbed's base images. What stood under a base image's
/// name before stands under it again. The engine's build cache stays: it is shared, and the engine bounds it itself.
#[derive(Debug)]
pub struct Leftovers {
    socket: PathBuf,
    scratch: PathBuf,
    installations: BTreeSet<String>,
    /// The image under each name before.
    base_images: BTreeMap<&'static str, Option<String>>,
    /// Removed once: a second time, the engine would make the mounted directory anew.
    done: AtomicBool,
}

impl Leftovers {
    /// Looks at what is there before anything is made. Below `scratch`, containers will leave files of their own users.
    ///
    /// # Errors
    /// When the engine does not answer.
    pub fn watch(engine: &Engine, scratch: &Path) -> Result<Arc<Self>> {
        let installations = of_sample(&things(engine)?);
        let base_images = images::ALL.into_iter().map(|name| (name, id_of(engine, name))).collect();
        let this = Arc::new(Self {
            socket: engine.socket().to_owned(),
            scratch: scratch.to_owned(),
            installations,
            base_images,
            done: AtomicBool::new(false),
        });
        let weak: Weak<Self> = Arc::downgrade(&this);
        cleanup::register(weak);
        Ok(this)
    }

    fn remove(&self) -> Result<()> {
        let engine = Engine::attach(&self.socket)?;
        // Kept over the rounds: of what is left at last, an image that all applications share, none says that it is the sample's.
        let mut ours = BTreeSet::new();
        for _ in 0..ROUNDS {
            let mut left = things(&engine)?;
            ours.extend(of_sample(&left).difference(&self.installations).cloned());
            left.retain(|thing| ours.contains(&thing.installation));
            if left.is_empty() {
                break;
            }
            for (kind, (_, _, remove)) in KINDS.iter().enumerate() {
                let ids: Vec<&str> = left.iter().filter(|t| t.kind == kind).map(|t| t.id.as_str()).collect();
                if !ids.is_empty()
                    && let Err(error) = engine.docker(&[remove, ids.as_slice()].concat())
                {
                    eprintln!("not everything could be removed yet: {error:#}");
                }
            }
        }
        // They are not this user's to remove.
        let mount = format!("{}:/scratch", self.scratch.display());
        let remove = ["run", "--rm", "--network", "none", "--volume", &mount, images::BUSYBOX, "sh", "-c"];
        if engine.docker(&["image", "inspect", images::BUSYBOX]).is_ok() {
            engine.docker(&[&remove[..], &["rm -rf /scratch/*"]].concat())?;
        }
        for name in images::ALL.iter().rev() {
            let before = self.base_images.get(name).cloned().flatten();
            // Where the run ended early it was never made.
            let Some(ours) = id_of(&engine, name).filter(|now| before.as_ref() != Some(now)) else { continue };
            match before {
                Some(theirs) => {
                    engine.docker(&["tag", &theirs, name])?;
                    engine.docker(&["rmi", &ours])?;
                }
                None => engine.docker(&["rmi", name]).map(drop)?,
            }
        }
        Ok(())
    }
}

impl CleanUp for Leftovers {
    fn clean_up(&self) {
        if self.done.swap(true, Ordering::SeqCst) {
            return;
        }
        if let Err(error) = self.remove() {
            eprintln!("something may be left on the engine at {}: {error:#}", self.socket.display());
        }
    }
}

impl Drop for Leftovers {
    fn drop(&mut self) {
        self.clean_up();
    }
}

fn id_of(engine: &Engine, image: &str) -> Option<String> {
    engine.docker(&["image", "inspect", "--format", "{{.Id}}", image]).ok()
}

struct Thing {
    /// Index in [`KINDS`].
    kind: usize,
    id: String,
    installation: String,
    /// Empty for the proxy's image, which all applications share.
    application: String,
}

/// The installations of the sample among them.
fn of_sample(things: &[Thing]) -> BTreeSet<String> {
    let of_sample = things.iter().filter(|thing| thing.application == APPLICATION);
    of_sample.map(|thing| thing.installation.clone()).collect()
}

/// Everything that belongs to any installation.
fn things(engine: &Engine) -> Result<Vec<Thing>> {
    let mut all = Vec::new();
    for (kind, (list, labels, _)) in KINDS.iter().enumerate() {
        let listed = engine.docker(&[list, &["--filter", "label=io.replank.installation"][..]].concat())?;
        let label = |name: &str| format!("{{{{index {labels} \"io.replank.{name}\"}}}}");
        // With a mark between them, as the second may be empty and the client's answer is trimmed.
        let format = format!("{}|{}", label("installation"), label("application"));
        // An image with two names is listed twice.
        for id in listed.split_whitespace().collect::<BTreeSet<_>>() {
            // What has gone meanwhile is not there.
            let Ok(found) = engine.docker(&["inspect", "--format", &format, id]) else { continue };
            let (installation, application) = found.split_once('|').unwrap_or_default();
            let (installation, application) = (installation.to_owned(), application.to_owned());
            all.push(Thing { kind, id: id.to_owned(), installation, application });
        }
    }
    Ok(all)
}
