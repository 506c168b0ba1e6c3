//! Hands a build's files to BuildKit over the session: it is told what there is and asks for what it needs.

use std::collections::BTreeSet;
use std::io::Read as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;

use async_trait::async_trait;
use bollard::fsutil::types::packet::PacketType;
use bollard::fsutil::types::{Packet, Stat};
use bollard::moby::filesync::packet::file_sync_server::FileSync;
use futures_util::Stream;
use regex::Regex;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status, Streaming};

use super::context::{Context, Entry, Kind, Root};
use super::ignore::{Ignore, Inherited};

/// One data packet; the engine takes messages of up to 4 MiB.
const CHUNK: usize = 32 * 1024;
/// Packets that may wait for the engine to take them: 1 MiB of file data.
const IN_FLIGHT: usize = 32;
/// Paths and patterns that a request may carry; real ones carry as many as a Dockerfile has instructions.
const ASKED_MAX: usize = 10_000;

/// Go's `os.FileMode` bits, which the protocol carries.
const MODE_DIR: u32 = 1 << 31;
const MODE_SYMLINK: u32 = 1 << 27;
const MODE_SETUID: u32 = 1 << 23;
const MODE_SETGID: u32 = 1 << 22;
const MODE_STICKY: u32 = 1 << 20;

type Packets = Pin<Box<dyn Stream<Item = Result<Packet, Status>> + Send>>;

/// Serves the two directories of one build, and nothing else of this machine.
#[derive(Debug, Clone)]
pub(super) struct Files(pub(super) Arc<Context>);

#[async_trait]
impl FileSync for Files {
    type DiffCopyStream = Packets;

    async fn diff_copy(&self, request: Request<Streaming<Packet>>) -> Result<Response<Packets>, Status> {
        let asked = Asked::from(request.metadata())?;
        let context = self.0.clone();
        let which = match asked.dir.as_str() {
            "context" => Which::Context,
            "dockerfile" => Which::Dockerfile,
            other => return Err(Status::not_found(format!("this build has no directory {other:?}"))),
        };
        let chosen = {
            let context = context.clone();
            tokio::task::spawn_blocking(move || choose(&which.root(&context).entries, &asked))
                .await
                .map_err(|e| Status::internal(e.to_string()))??
        };
        let (out, packets) = mpsc::channel(IN_FLIGHT);
        let (ask, asked_for) = mpsc::unbounded_channel();
        let finish = out.clone();
        tokio::spawn(listen(request.into_inner(), ask, finish, chosen.len()));
        tokio::spawn(send(context, which, chosen, asked_for, out));
        Ok(Response::new(Box::pin(ReceiverStream::new(packets))))
    }

    type TarStreamStream = Packets;

    async fn tar_stream(&self, _: Request<Streaming<Packet>>) -> Result<Response<Packets>, Status> {
        Err(Status::unimplemented("only DiffCopy is served"))
    }
}

#[derive(Debug, Clone, Copy)]
enum Which {
    Context,
    Dockerfile,
}

impl Which {
    fn root(self, context: &Context) -> &Root {
        match self {
            Self::Context => &context.context,
            Self::Dockerfile => &context.dockerfile,
        }
    }
}

/// Takes what the engine asks for. Reading never waits for sending, else both sides could wait for each other.
async fn listen(
    mut requests: Streaming<Packet>,
    ask: mpsc::UnboundedSender<u32>,
    out: mpsc::Sender<Result<Packet, Status>>,
    known: usize,
) {
    // Each entry is asked for at most once; more than that is no BuildKit.
    let mut left = known;
    while let Ok(Some(packet)) = requests.message().await {
        match PacketType::try_from(packet.r#type) {
            Ok(PacketType::PacketReq) if left > 0 => {
                left -= 1;
                if ask.send(packet.id).is_err() {
                    return;
                }
            }
            Ok(PacketType::PacketFin) => {
                // A receiver that is gone needs no answer.
                out.send(Ok(of_type(PacketType::PacketFin))).await.unwrap_or_default();
                return;
            }
            Ok(PacketType::PacketErr) => return,
            Ok(PacketType::PacketReq | PacketType::PacketStat | PacketType::PacketData) | Err(_) => {
                out.send(Err(Status::invalid_argument("unexpected packet"))).await.unwrap_or_default();
                return;
            }
        }
    }
}

/// Says what there is, then sends what is asked for, one file after the other.
async fn send(
    context: Arc<Context>,
    which: Which,
    chosen: Vec<usize>,
    mut asked_for: mpsc::UnboundedReceiver<u32>,
    out: mpsc::Sender<Result<Packet, Status>>,
) {
    let root = which.root(&context);
    for &at in &chosen {
        let packet = Packet { stat: Some(stat(&root.entries[at])), ..of_type(PacketType::PacketStat) };
        if out.send(Ok(packet)).await.is_err() {
            return;
        }
    }
    if out.send(Ok(of_type(PacketType::PacketStat))).await.is_err() {
        return;
    }
    while let Some(id) = asked_for.recv().await {
        let context = context.clone();
        let entry = usize::try_from(id).ok().and_then(|id| chosen.get(id).copied());
        let data = out.clone();
        let sent = tokio::task::spawn_blocking(move || {
            let root = which.root(&context);
            let entry = entry.and_then(|at| root.entries.get(at)).ok_or("a file was asked for that does not exist")?;
            send_file(&root.dir, entry, id, &data)
        })
        .await;
        let wrong = match sent {
            Ok(Ok(())) => continue,
            Ok(Err(wrong)) => wrong,
            Err(_) => "the file's reader failed",
        };
        let packet = Packet { data: wrong.as_bytes().to_vec(), ..of_type(PacketType::PacketErr) };
        out.send(Ok(packet)).await.unwrap_or_default();
        return;
    }
}

fn send_file(
    dir: &Path,
    entry: &Entry,
    id: u32,
    out: &mpsc::Sender<Result<Packet, Status>>,
) -> Result<(), &'static str> {
    let Kind::File { size } = entry.kind else {
        return Err("something was asked for that is not a file");
    };
    // What was a file when the tree was looked at must not have become a link since.
    let flags = i32::try_from((rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::CLOEXEC).bits())
        .map_err(|_| "the flags do not fit")?;
    let file = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(dir.join(&entry.path))
        .map_err(|_| "a file of the build context cannot be read any more")?;
    let mut file = file.take(size);
    loop {
        let mut data = vec![0; CHUNK];
        let mut filled = 0;
        while filled < CHUNK {
            match file.read(&mut data[filled..]) {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => return Err("a file of the build context cannot be read any more"),
            }
        }
        data.truncate(filled);
        // An empty packet ends the file.
        let packet = Packet { id, data, ..of_type(PacketType::PacketData) };
        if out.blocking_send(Ok(packet)).is_err() || filled == 0 {
            return Ok(());
        }
    }
}

fn of_type(kind: PacketType) -> Packet {
    Packet { r#type: kind.into(), stat: None, id: 0, data: Vec::new() }
}

/// As the engine wants it: owned by root, like every build context that the Docker client sends.
fn stat(entry: &Entry) -> Stat {
    let mut mode = entry.mode & 0o777;
    for (unix, go) in [(0o4000, MODE_SETUID), (0o2000, MODE_SETGID), (0o1000, MODE_STICKY)] {
        if entry.mode & unix != 0 {
            mode |= go;
        }
    }
    let (size, linkname) = match &entry.kind {
        Kind::Dir => {
            mode |= MODE_DIR;
            (0, String::new())
        }
        Kind::File { size } => (i64::try_from(*size).unwrap_or(i64::MAX), String::new()),
        Kind::Link { target } => {
            mode |= MODE_SYMLINK;
            (0, target.clone())
        }
    };
    Stat { path: entry.path.clone(), mode, size, mod_time: entry.modified_ns, linkname, ..Stat::default() }
}

/// What the engine's request narrows the directory down to.
#[derive(Debug, Default)]
struct Asked {
    dir: String,
    excludes: Vec<String>,
    includes: Vec<String>,
    follow: Vec<String>,
}

impl Asked {
    fn from(metadata: &MetadataMap) -> Result<Self, Status> {
        let list = |key: &str| -> Result<Vec<String>, Status> {
            let encoded = metadata.get(format!("{key}-encoded")).is_some_and(|v| v == "1");
            let values: Vec<String> = metadata
                .get_all(key)
                .iter()
                .take(ASKED_MAX + 1)
                .filter_map(|value| value.to_str().ok())
                .map(|value| if encoded { query_unescape(value) } else { value.to_owned() })
                .collect();
            if values.len() > ASKED_MAX {
                return Err(Status::invalid_argument("too many patterns"));
            }
            Ok(values)
        };
        Ok(Self {
            dir: list("dir-name")?.into_iter().next().unwrap_or_default(),
            excludes: list("exclude-patterns")?,
            includes: list("include-patterns")?,
            follow: list("followpaths")?,
        })
    }
}

/// Undoes Go's `url.QueryEscape`.
fn query_unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(b) = rest.next() {
        match b {
            b'+' => bytes.push(b' '),
            b'%' => {
                let hex = [rest.next(), rest.next()].map(|h| h.and_then(|h| char::from(h).to_digit(16)));
                if let [Some(high), Some(low)] = hex {
                    bytes.push((high * 16 + low) as u8);
                }
            }
            b => bytes.push(b),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The entries that a request is about, by position, each after its parents.
fn choose(entries: &[Entry], asked: &Asked) -> Result<Vec<usize>, Status> {
    let invalid = |e: super::ignore::IgnoreError| Status::invalid_argument(e.to_string());
    let ignore = Ignore::new(asked.excludes.iter().map(String::as_str)).map_err(invalid)?;
    let mut includes = asked.includes.clone();
    if !asked.follow.is_empty() {
        includes.extend(follow(entries, &asked.follow)?);
    }
    // The root itself among the includes means everything.
    let everything = includes.is_empty() || includes.iter().any(|p| p == "." || p.is_empty());
    let includes = includes.iter().map(|p| Include::new(p)).collect::<Result<Vec<_>, _>>()?;

    let mut chosen = Vec::new();
    // The directories above the current entry: what they hand on, and where they stand if they were not chosen yet.
    let mut above: Vec<(usize, Inherited, bool)> = Vec::new();
    for (at, entry) in entries.iter().enumerate() {
        while above.last().is_some_and(|(dir, ..)| !is_below(&entry.path, &entries[*dir].path)) {
            above.pop();
        }
        let nothing = Inherited::default();
        let inherited = above.last().map_or(&nothing, |(_, inherited, _)| inherited);
        let (out, handed_on) = ignore.check(&entry.path, inherited);
        let take = !out && (everything || includes.iter().any(|include| include.covers(&entry.path)));
        if take {
            for (dir, _, taken) in &mut above {
                if !*taken {
                    *taken = true;
                    chosen.push(*dir);
                }
            }
            chosen.push(at);
        }
        if entry.kind == Kind::Dir {
            above.push((at, handed_on, take));
        }
    }
    Ok(chosen)
}

fn is_below(path: &str, dir: &str) -> bool {
    path.strip_prefix(dir).is_some_and(|rest| rest.starts_with('/'))
}

/// A pattern per path component; what lies below a match is included too.
#[derive(Debug)]
struct Include(Vec<Regex>);

impl Include {
    fn new(pattern: &str) -> Result<Self, Status> {
        let parts = pattern.split('/').filter(|part| !part.is_empty() && *part != ".");
        parts.map(component).collect::<Result<_, _>>().map(Self)
    }

    fn covers(&self, path: &str) -> bool {
        let mut parts = path.split('/');
        self.0.iter().all(|regex| parts.next().is_some_and(|part| regex.is_match(part)))
    }
}

fn component(part: &str) -> Result<Regex, Status> {
    super::ignore::name_pattern(part).ok_or_else(|| Status::invalid_argument("a path's pattern is not valid"))
}

/// The paths that are needed to reach what was asked for, links on the way and their targets included. Targets are taken
/// relative to the root, as inside an image: they cannot leave it.
fn follow(entries: &[Entry], paths: &[String]) -> Result<Vec<String>, Status> {
    let mut found = BTreeSet::new();
    let mut todo: Vec<String> = paths.to_vec();
    let mut steps = 0;
    while let Some(path) = todo.pop() {
        steps += 1;
        if steps > ASKED_MAX {
            return Err(Status::invalid_argument("too many links to follow"));
        }
        let path = lexical(&path);
        let mut current = String::new();
        let mut rest = path.as_str();
        loop {
            let (part, tail) = rest.split_once('/').unwrap_or((rest, ""));
            current = if current.is_empty() { part.to_owned() } else { format!("{current}/{part}") };
            let targets = targets(entries, &current)?;
            if targets.is_empty() {
                if tail.is_empty() {
                    found.insert(if current.is_empty() { ".".to_owned() } else { current });
                    break;
                }
            } else {
                if found.insert(current.clone()) || !tail.is_empty() {
                    todo.extend(targets.iter().map(|t| format!("{t}/{tail}")));
                }
                break;
            }
            rest = tail;
        }
    }
    Ok(found.into_iter().collect())
}

/// Where the links lead that a path, whose last component may be a pattern, names.
fn targets(entries: &[Entry], path: &str) -> Result<Vec<String>, Status> {
    let resolve = |entry: &Entry| match &entry.kind {
        Kind::Link { target } if target.starts_with('/') => Some(target.clone()),
        Kind::Link { target } => {
            let parent = entry.path.rsplit_once('/').map_or("", |(parent, _)| parent);
            Some(format!("{parent}/{target}"))
        }
        Kind::Dir | Kind::File { .. } => None,
    };
    if !path.contains(['*', '?', '[', '\\']) {
        return Ok(entries.iter().find(|e| e.path == path).and_then(resolve).into_iter().collect());
    }
    let include = Include::new(path)?;
    let depth = path.split('/').count();
    Ok(entries
        .iter()
        .filter(|e| {
            matches!(e.kind, Kind::Link { .. }) && e.path.split('/').count() == depth && include.covers(&e.path)
        })
        .filter_map(resolve)
        .take(ASKED_MAX)
        .collect())
}

/// A path without '.' and '..'; what would leave the root stays at it.
fn lexical(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(list: &[&str]) -> Vec<Entry> {
        list.iter()
            .map(|text| {
                let (path, kind) = match text.split_once(" -> ") {
                    Some((path, target)) => (path, Kind::Link { target: target.to_owned() }),
                    None => match text.strip_suffix('/') {
                        Some(path) => (path, Kind::Dir),
                        None => (*text, Kind::File { size: 0 }),
                    },
                };
                Entry { path: path.to_owned(), kind, mode: 0o644, modified_ns: 0 }
            })
            .collect()
    }

    #[test]
    fn requests_are_answered_with_what_they_name_and_its_parents() {
        let all = ["a/", "a/b/", "a/b/c", "a/d", "link -> a/b", "x.txt", "y.txt"];
        for (excludes, follow, expect) in [
            (&[][..], &[][..], &["a", "a/b", "a/b/c", "a/d", "link", "x.txt", "y.txt"][..]),
            (&[], &["x.txt"], &["x.txt"]),
            (&[], &["."], &["a", "a/b", "a/b/c", "a/d", "link", "x.txt", "y.txt"]),
            (&[], &["a/b"], &["a", "a/b", "a/b/c"]),
            (&[], &["*.txt"], &["x.txt", "y.txt"]),
            (&[], &["link"], &["a", "a/b", "a/b/c", "link"]),
            (&[], &["link/c"], &["a", "a/b", "a/b/c", "link"]),
            (&[], &["missing"], &[]),
            (&["a", "!a/b/c"], &[], &["a", "a/b", "a/b/c", "link", "x.txt", "y.txt"]),
            (&["**/c"], &["a"], &["a", "a/b", "a/d"]),
        ] {
            let strings = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect();
            let asked = Asked { excludes: strings(excludes), follow: strings(follow), ..Asked::default() };
            let all = entries(&all);
            let got: Vec<_> =
                choose(&all, &asked).expect("choice").into_iter().map(|at| all[at].path.as_str()).collect();
            assert_eq!(got, expect, "excludes {excludes:?} follow {follow:?}");
        }
    }

    #[test]
    fn links_in_a_circle_end() {
        let all = entries(&["a -> b", "b -> a", "up -> ../../.."]);
        let asked = Asked { follow: vec!["a/x".to_owned()], ..Asked::default() };
        assert!(choose(&all, &asked).is_err());
        let asked = Asked { follow: vec!["a".to_owned()], ..Asked::default() };
        assert_eq!(choose(&all, &asked).expect("choice"), [0, 1]);
    }

    #[test]
    fn escaped_values_are_read() {
        assert_eq!(query_unescape("a+b%2Fc%C3%A9"), "a b/cé");
    }
}
