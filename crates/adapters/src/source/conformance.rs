//! What every `Source` must do, as a suite that runs against real implementations.

use std::fs;

use replank_core::ports::{FileSeen, NoLog, Source};
use replank_core::record::{Target, TargetKind};
use replank_core::words::{CommitSha, JobId, Version};

/// A remote that was prepared for the suite.
#[derive(Debug, Clone)]
pub struct World {
    /// Releases and their commits, newest first; the first two on different commits.
    pub releases: Vec<(Version, CommitSha)>,
    /// The tracking branch's head, and its ref.
    pub branch: (String, CommitSha),
    /// A file of the newest release, and its content.
    pub file: (String, Vec<u8>),
}

macro_rules! ensure {
    ($ok:expr, $($why:tt)+) => {
        if !$ok {
            return Err(format!($($why)+));
        }
    };
}

/// Runs the suite; the error names the broken promise.
pub async fn check(source: &dyn Source, world: &World) -> Result<(), String> {
    let refs = source.refs().await.map_err(|e| format!("refs: {}", e.chain()))?;
    let seen: Vec<_> = refs.tags.iter().map(|t| (t.version.clone(), t.commit.clone())).collect();
    ensure!(seen == world.releases, "releases are newest first and peeled: {seen:?}");
    ensure!(refs.branch.as_ref() == Some(&world.branch), "the branch's head: {:?}", refs.branch);
    let (Some((version, commit)), Some((_, other))) = (world.releases.first(), world.releases.get(1)) else {
        return Err("the world has fewer than two releases".to_owned());
    };
    ensure!(commit != other, "the world's first two releases are on different commits");
    let target = |commit: &CommitSha| Target {
        kind: TargetKind::Release,
        version: version.clone(),
        commit: commit.clone(),
        raw_ref: format!("refs/tags/{}", version.tag()),
    };
    let job = |name: &str| JobId::new(name).map_err(|e| e.to_string());

    looks(source, world, &target(commit), other).await?;

    let first = job("conformance-1")?;
    let tree = source.fetch(&first, &target(commit), &NoLog).await.map_err(|e| format!("fetch: {}", e.chain()))?;
    ensure!(tree.commit == *commit, "the tree is the pinned commit: {}", tree.commit);
    let file = tree.path.join(&world.file.0);
    let read = || fs::read(&file).map_err(|e| e.to_string());
    ensure!(read()? == world.file.1, "the tree holds the release's files");
    let again = source.fetch(&first, &target(commit), &NoLog).await.map_err(|e| format!("again: {}", e.chain()))?;
    ensure!(again == tree, "a second fetch finds the first one's tree");

    fs::write(&file, b"changed").map_err(|e| e.to_string())?;
    source.fetch(&first, &target(commit), &NoLog).await.map_err(|e| format!("repair: {}", e.chain()))?;
    ensure!(read()? == world.file.1, "a changed tree is not taken for the pinned commit");

    match source.fetch(&job("conformance-2")?, &target(other), &NoLog).await {
        Ok(_) => return Err("another commit than the pinned one was returned".to_owned()),
        Err(fault) => {
            let told = fault.told().what;
            ensure!(told.contains(commit.as_str()) && told.contains(other.as_str()), "both commits are named: {told}");
        }
    }
    source.discard_all_but(Some(&first)).await.map_err(|e| format!("discard others: {}", e.chain()))?;
    ensure!(read()? == world.file.1, "the tree that is wanted stays");
    for _ in 0..2 {
        source.discard_all_but(None).await.map_err(|e| format!("discard: {}", e.chain()))?;
        ensure!(!tree.path.exists(), "a discarded tree is gone");
    }
    Ok(())
}

/// Looks without a job. `other` is an ancestor of the target.
async fn looks(source: &dyn Source, world: &World, target: &Target, other: &CommitSha) -> Result<(), String> {
    let (name, content) = &world.file;
    let peek = async |target: &Target, since: Option<&CommitSha>, path: &str, max: usize| {
        source.peek(target, since, path, max).await.map_err(|e| format!("peek: {}", e.chain()))
    };
    let seen = peek(target, Some(other), name, content.len()).await?;
    ensure!(seen.file == FileSeen::Holds(content.clone()), "a look sees the commit's file: {:?}", seen.file);
    let between = seen.commits.map_err(|why| format!("the commits between: {why}"))?;
    let newest = between.commits.first().map(|commit| &commit.id);
    ensure!(newest == Some(&target.commit) && !between.more, "the newest commit comes first: {between:?}");
    ensure!(between.commits.iter().all(|commit| commit.id != *other), "what runs is not between: {between:?}");
    let none = peek(target, Some(&target.commit), "no/such/file", 10).await?;
    ensure!(none.file == FileSeen::Absent, "what is not there is absent: {:?}", none.file);
    ensure!(none.commits.as_ref().is_ok_and(|c| c.commits.is_empty() && !c.more), "nothing lies between: {none:?}");
    let first = peek(target, None, name, content.len() - 1).await?;
    ensure!(matches!(first.file, FileSeen::Unfit(_)), "what is too large is unfit: {:?}", first.file);
    ensure!(first.commits.as_ref().is_ok_and(|c| c.commits.is_empty()), "without a beginning there is no between");
    let older = Target { commit: other.clone(), ..target.clone() };
    let seen = peek(&older, Some(&target.commit), name, 1_000).await?;
    ensure!(
        seen.file != FileSeen::Holds(content.clone()),
        "what is seen is of the pinned commit, whatever the tag says"
    );
    ensure!(seen.commits.as_ref().is_ok_and(|c| c.more), "a commit that was not met is told: {:?}", seen.commits);
    ensure!(source.peek(target, None, "../x", 10).await.is_err(), "a path leads out");
    Ok(())
}
