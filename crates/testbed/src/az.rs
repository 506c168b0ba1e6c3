//! A stand-in for the Azure CLI where no Azure is: it records what it was asked, and really builds and pushes with an engine.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::Engine;

/// `az acr build` as an engine does it: the classic builder prints steps as the registry's own service does.
///
/// `mode` beside the records says what goes otherwise, for one repository or for all: `lie` ends well without a build, `fail`
/// ends badly, `together` waits until a sign-in and three builds were begun, `detach` builds in a process that outlives it, and
/// waits until it is killed.
const SCRIPT: &str = r#"#!/bin/sh
here=$AZ_DOUBLE
call=$(mktemp -d "$here/calls/$(date +%s%N).XXXXXX")
for word in "$@"; do printf '%s\n' "$word"; done > "$call/arguments"
env > "$call/environment"
pwd > "$call/directory"
cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\0' ' ' > "$call/processes"
touch "$call/whole"

if [ "$1" = login ]; then
    [ ! -e "$here/no-login" ] || { echo "ERROR: no identity" >&2; exit 1; }
    echo '[]'
    exit 0
fi
[ "$1 $2" = "acr build" ] || { echo "ERROR: '$1 $2' is not recognized" >&2; exit 2; }
shift 2
images= arguments= file= context=
while [ $# -gt 0 ]; do
    case $1 in
        --registry) shift ;;
        --image) images="$images $2"; shift ;;
        --file) file=$2; shift ;;
        --build-arg) arguments="$arguments --build-arg $2"; shift ;;
        --*) echo "ERROR: unrecognized arguments: $1" >&2; exit 2 ;;
        *) context=$1 ;;
    esac
    shift
done
name=${images# }
name=${name%%:*}
tags=
for image in $images; do tags="$tags --tag $AZ_DOUBLE_REGISTRY/$image"; done
build() {
    docker build $tags --file "$file" $arguments "$context" || return 1
    for image in $images; do docker push --quiet "$AZ_DOUBLE_REGISTRY/$image" || return 1; done
}
echo "Queued a build with ID: cf1" >&2
echo "Waiting for an agent..." >&2
mode=$(cat "$here/mode-$name" 2>/dev/null || cat "$here/mode" 2>/dev/null || echo build)
case $mode in
    lie) echo "Run ID: cf1 was successful after 1s"; exit 0 ;;
    fail) echo "Step 1/2 : FROM scratch"; echo "2026/01/01 00:00:00 the step failed: password=hunter2-in-a-log" >&2; exit 1 ;;
    together) while [ "$(ls "$here/calls" | wc -l)" -lt 4 ]; do sleep 0.05; done ;;
    detach)
        cp -r . "$call/tree"
        echo "$$" > "$call/pid"
        # As the registry's service would: somewhere else, whatever becomes of this process.
        export tags file arguments images context AZ_DOUBLE_REGISTRY here
        cd "$call/tree" && setsid sh -c 'while [ ! -e "$here/go" ]; do sleep 0.05; done
            docker build $tags --file "$file" $arguments "$context" &&
            for image in $images; do docker push --quiet "$AZ_DOUBLE_REGISTRY/$image"; done' > "$call/built" 2>&1 < /dev/null &
        touch "$here/detached"
        exec sleep 600
        ;;
esac
build || exit 1
echo "Run ID: cf1 was successful after 1s"
"#;

/// One call, as the double saw it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    pub arguments: Vec<String>,
    pub environment: String,
    pub directory: PathBuf,
    /// The command lines of all processes at that moment.
    pub processes: String,
}

/// A directory with an `az`, and what it was asked.
#[derive(Debug)]
pub struct AzDouble {
    place: PathBuf,
}

impl AzDouble {
    /// # Errors
    /// When the directory cannot be made.
    pub fn create(place: &Path) -> Result<Self> {
        fs::create_dir_all(place.join("bin"))?;
        fs::create_dir_all(place.join("calls"))?;
        let path = place.join("bin/az");
        fs::write(&path, SCRIPT)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(Self { place: place.to_owned() })
    }

    /// What leads a process to it: `path` is the rest of its `PATH`.
    #[must_use]
    pub fn environment(&self, engine: &Engine, registry: &str, path: &str) -> Vec<(String, String)> {
        let docker = engine.docker_command();
        let client = Path::new(docker.get_program()).parent().unwrap_or(Path::new("/usr/bin")).display().to_string();
        [
            ("PATH", format!("{}:{client}:{path}", self.place.join("bin").display())),
            ("AZ_DOUBLE", self.place.display().to_string()),
            ("AZ_DOUBLE_REGISTRY", registry.to_owned()),
            ("DOCKER_HOST", engine.host()),
            ("DOCKER_BUILDKIT", "0".to_owned()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .to_vec()
    }

    /// What `az acr build` does from now on for images of this repository; an empty name stands for all.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn set_mode(&self, repository: &str, mode: &str) -> Result<()> {
        let name = if repository.is_empty() { "mode".to_owned() } else { format!("mode-{repository}") };
        Ok(fs::write(self.place.join(name), mode)?)
    }

    /// Waits until a build was begun that outlives its `az`.
    ///
    /// # Errors
    /// When that takes longer than `limit`.
    pub fn until_detached(&self, limit: Duration) -> Result<()> {
        let end = Instant::now() + limit;
        while !self.place.join("detached").exists() {
            if Instant::now() >= end {
                bail!("no build was begun that outlives its az");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Lets the builds that outlive their `az` go on.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn go(&self) -> Result<()> {
        Ok(fs::write(self.place.join("go"), "")?)
    }

    /// Lets `az login` fail.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn refuse_login(&self) -> Result<()> {
        Ok(fs::write(self.place.join("no-login"), "")?)
    }

    /// The calls so far, oldest first.
    ///
    /// # Errors
    /// When a record cannot be read.
    pub fn calls(&self) -> Result<Vec<Call>> {
        let mut places: Vec<PathBuf> =
            fs::read_dir(self.place.join("calls"))?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
        places.retain(|place| place.join("whole").exists());
        places.sort();
        let read = |place: &Path, name: &str| -> Result<String> {
            // Command lines and variables need not be UTF-8.
            Ok(String::from_utf8_lossy(&fs::read(place.join(name)).context("a record")?).into_owned())
        };
        let call = |place: &PathBuf| {
            Ok(Call {
                arguments: read(place, "arguments")?.lines().map(str::to_owned).collect(),
                environment: read(place, "environment")?,
                directory: PathBuf::from(read(place, "directory")?.trim()),
                processes: read(place, "processes")?,
            })
        };
        places.iter().map(call).collect()
    }

    /// The calls of `az acr build`.
    ///
    /// # Errors
    /// As [`Self::calls`].
    pub fn builds(&self) -> Result<Vec<Call>> {
        let mut calls = self.calls()?;
        calls.retain(|call| call.arguments.first().is_some_and(|word| word == "acr"));
        Ok(calls)
    }

    /// Waits until so many builds were begun.
    ///
    /// # Errors
    /// When that takes longer than `limit`.
    pub fn until_builds(&self, count: usize, limit: Duration) -> Result<()> {
        let end = Instant::now() + limit;
        while self.builds()?.len() < count {
            if Instant::now() >= end {
                bail!("az acr build was called {} times, not {count}", self.builds()?.len());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}
