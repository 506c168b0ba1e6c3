//! The sample application's repository: four components and three releases, of which the last does not work.

use std::path::Path;

use anyhow::Result;

use crate::repo::{Entry, Repo};

/// So many generated units keep two processors compiling for about ten seconds.
pub const FULL_UNITS: u32 = 40;

/// The components' names, each with its Dockerfile at `<name>/Dockerfile` and the repository's root as its context.
pub const COMPONENTS: [&str; 4] = ["api", "controller", "frontend", "worker"];

/// The repository's name below the served directory.
pub const NAME: &str = "sample";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SampleOptions {
    /// Generated translation units of the api; each takes a processor half a second.
    pub units: u32,
}

impl Default for SampleOptions {
    fn default() -> Self {
        Self { units: FULL_UNITS }
    }
}

impl SampleOptions {
    /// For tests whose point is not the build's duration.
    #[must_use]
    pub fn small() -> Self {
        Self { units: 1 }
    }
}

/// A tagged release.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Release {
    /// Without the `v`.
    pub version: String,
    pub tag: String,
    /// What the tag points at in the end, 40 hex digits.
    pub commit: String,
}

/// The repository, open for more commits.
#[derive(Debug)]
pub struct Sample {
    pub repo: Repo,
    /// v0.1.0, v0.2.0 (another page) and v0.3.0 (its api starts, and fails its probes).
    pub releases: Vec<Release>,
}

impl Sample {
    /// Writes `<root>/sample.git`.
    ///
    /// # Errors
    /// When it exists or git fails.
    pub fn create(root: &Path, options: SampleOptions) -> Result<Self> {
        let mut sample = Self { repo: Repo::create(root, NAME)?, releases: Vec::new() };
        let mut first = base();
        first.push(Entry::file("api/UNITS", format!("{}\n", options.units)));
        sample.release("0.1.0", &first, "The first release")?;
        let page = Entry::file("frontend/page.h", include_str!("../sample/v0.2.0/page.h"));
        sample.release("0.2.0", &[page], "A new look")?;
        let health = Entry::file("api/health.h", include_str!("../sample/v0.3.0/health.h"));
        sample.release("0.3.0", &[health], "A release that does not work")?;
        Ok(sample)
    }

    /// Commits the changes on `main` and tags them `v<version>`, annotated.
    ///
    /// # Errors
    /// When git fails.
    pub fn release(&mut self, version: &str, changes: &[Entry], message: &str) -> Result<&Release> {
        let commit = self.repo.commit(changes, message)?;
        let tag = format!("v{version}");
        self.repo.tag(&tag, &commit, message)?;
        self.releases.push(Release { version: version.to_owned(), tag, commit });
        Ok(&self.releases[self.releases.len() - 1])
    }
}

/// The files of the first release, but for the number of units.
fn base() -> Vec<Entry> {
    macro_rules! files {
        ($($path:literal)*) => { vec![$(Entry::file($path, include_str!(concat!("../sample/", $path)))),*] };
    }
    files![
        "README.md"
        "server/http.h" "server/http.c"
        "api/Dockerfile" "api/Makefile" "api/api.c" "api/health.h" "api/generate.sh"
        "frontend/Dockerfile" "frontend/frontend.c" "frontend/page.h"
        "worker/Dockerfile" "worker/worker.sh"
        "controller/Dockerfile"
    ]
}
