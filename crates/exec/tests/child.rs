//! Real programs, ended in every way: by themselves, by their time, by their client, with what they started.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::future::Future;
use std::path::Path;
use std::time::Duration;

use replank_exec::protocol::Stream;
use replank_exec::server::child::{Ended, Order, Sink, run};
use tokio::sync::oneshot;

/// Keeps everything; tells when the first bytes came, and goes away when told to.
#[derive(Default)]
struct Kept {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    begun: Option<oneshot::Sender<()>>,
    leave: Option<oneshot::Receiver<()>>,
    /// Never takes anything.
    is_stuck: bool,
}

impl Sink for Kept {
    async fn take(&mut self, stream: Stream, bytes: &[u8]) -> bool {
        if let Some(begun) = self.begun.take() {
            begun.send(()).ok();
        }
        match stream {
            Stream::Stdout => self.stdout.extend_from_slice(bytes),
            Stream::Stderr => self.stderr.extend_from_slice(bytes),
        }
        if self.is_stuck {
            std::future::pending::<()>().await;
        }
        true
    }

    fn gone(&mut self) -> impl Future<Output = ()> + Send {
        let leave = self.leave.as_mut();
        async {
            match leave {
                Some(leave) => drop(leave.await),
                None => std::future::pending().await,
            }
        }
    }
}

fn order(script: &str, timeout: Duration) -> Order {
    Order {
        argv: ["sh", "-c", script].map(str::to_owned).to_vec(),
        directory: "/".into(),
        environment: BTreeMap::from([("PATH".into(), std::env::var_os("PATH").unwrap())]),
        input: None,
        timeout,
        room: None,
    }
}

const LONG: Duration = Duration::from_secs(60);

async fn kept(order: Order) -> (Ended, Kept) {
    let mut sink = Kept::default();
    let ended = run(order, &mut sink).await.unwrap();
    (ended, sink)
}

/// Waits until no process with this number is left, dead ones that nobody waits for not counted.
async fn until_gone(pid: &str) {
    let stat = Path::new("/proc").join(pid.trim()).join("stat");
    for _ in 0..500 {
        match std::fs::read_to_string(&stat) {
            Ok(text) if !text.contains(") Z ") => tokio::time::sleep(Duration::from_millis(10)).await,
            _ => return,
        }
    }
    panic!("process {pid} is still there");
}

#[tokio::test]
async fn both_outputs_and_the_code_come_through() {
    let (ended, kept) = kept(order("echo out; echo err >&2; exit 7", LONG)).await;
    assert_eq!((ended.exit_code, ended.timed_out, ended.client_gone), (7, false, false));
    assert_eq!((kept.stdout, kept.stderr), (b"out\n".to_vec(), b"err\n".to_vec()));
    let (ended, _) = self::kept(order("kill -9 $$", LONG)).await;
    assert_eq!(ended.exit_code, 137);
}

#[tokio::test]
async fn a_program_that_is_not_there_is_an_error() {
    let missing = Order { argv: vec!["no-such-program-here".to_owned()], ..order("", LONG) };
    assert_eq!(run(missing, &mut Kept::default()).await.unwrap_err().kind(), std::io::ErrorKind::NotFound);
}

/// Input and output are both larger than a pipe, and the program writes before it has read: neither side waits for ever.
#[tokio::test]
async fn input_and_output_flow_beside_each_other() {
    let input = vec![b'x'; 4 << 20];
    let order = Order { input: Some(input.clone()), ..order("cat", LONG) };
    let (ended, kept) = kept(order).await;
    assert_eq!(ended.exit_code, 0);
    assert!(kept.stdout == input, "{} bytes came back", kept.stdout.len());
    // One that never reads ends all the same.
    let (ended, _) = self::kept(Order { input: Some(input), ..self::order("exit 3", LONG) }).await;
    assert_eq!(ended.exit_code, 3);
}

#[tokio::test]
async fn nothing_is_inherited() {
    let (_, kept) = kept(order("env; readlink /proc/$$/fd/0", LONG)).await;
    let text = String::from_utf8(kept.stdout).unwrap();
    assert!(
        text.lines()
            .all(|line| ["PATH=", "PWD=", "SHLVL=", "_=", "OLDPWD=", "/dev/null"].iter().any(|k| line.starts_with(k))),
        "{text}"
    );
    assert!(text.contains("/dev/null"), "{text}");
}

/// SIGTERM first; who ignores it, and whom it started, is killed five seconds later.
#[tokio::test]
async fn time_over_ends_the_whole_group() {
    let (ended, kept) =
        kept(order("trap 'echo told; exit 9' TERM; sleep 600 & echo $!; wait", Duration::from_millis(300))).await;
    assert_eq!((ended.exit_code, ended.timed_out), (124, true));
    let text = String::from_utf8(kept.stdout).unwrap();
    assert!(text.contains("told"), "SIGTERM was not heard: {text}");
    until_gone(text.lines().next().unwrap()).await;
    assert!(ended.took < Duration::from_secs(5), "{ended:?}");

    let deaf = "trap '' TERM; sh -c 'trap \"\" TERM; while :; do sleep 1; done' & echo $!; while :; do sleep 1; done";
    let (ended, kept) = self::kept(order(deaf, Duration::from_millis(300))).await;
    assert_eq!((ended.exit_code, ended.timed_out), (124, true));
    assert!(ended.took >= Duration::from_secs(5), "{ended:?}");
    until_gone(&String::from_utf8(kept.stdout).unwrap()).await;
}

#[tokio::test]
async fn a_client_that_goes_takes_the_group_with_it() {
    let (begun, on_begun) = oneshot::channel();
    let (leave, on_leave) = oneshot::channel();
    let mut sink = Kept { begun: Some(begun), leave: Some(on_leave), ..Kept::default() };
    let running = tokio::spawn(async move {
        let ended = run(order("trap '' TERM; sleep 600 & echo $!; wait", LONG), &mut sink).await.unwrap();
        (ended, sink)
    });
    on_begun.await.unwrap();
    leave.send(()).unwrap();
    let (ended, kept) = running.await.unwrap();
    assert!(ended.client_gone && ended.took < Duration::from_secs(5), "{ended:?}");
    until_gone(&String::from_utf8(kept.stdout).unwrap()).await;
}

#[tokio::test]
async fn a_dropped_run_kills_the_group() {
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("pid");
    let script = format!("sleep 600 & echo $! > {}; echo; wait", file.display());
    let (begun, on_begun) = oneshot::channel();
    let running = tokio::spawn(async move {
        let mut sink = Kept { begun: Some(begun), ..Kept::default() };
        run(order(&script, LONG), &mut sink).await
    });
    on_begun.await.unwrap();
    running.abort();
    until_gone(&std::fs::read_to_string(file).unwrap()).await;
}

/// A client that takes nothing holds the program back, and yet cannot keep it beyond its time.
#[tokio::test]
async fn a_stuck_client_stops_the_program_and_not_the_clock() {
    let mut sink = Kept { is_stuck: true, ..Kept::default() };
    let ended = run(order("yes", Duration::from_millis(300)), &mut sink).await.unwrap();
    assert!(ended.timed_out && ended.client_gone, "{ended:?}");
    assert!(sink.stdout.len() <= 64 * 1024, "{} bytes were taken", sink.stdout.len());
}

/// Who closes its outputs is not out of reach: it goes with the program, whether that ended by itself, by its time or by its
/// client, and is not left as a dead entry where nobody else would wait for it.
#[tokio::test]
async fn who_hides_from_the_outputs_ends_as_well() {
    rustix::process::set_child_subreaper(Some(rustix::process::getpid())).unwrap();
    let deaf = "sh -c 'trap \"\" TERM; while :; do sleep 1; done' >/dev/null 2>&1 & echo $!";
    let gone = |kept: &Kept| {
        let pid = String::from_utf8(kept.stdout.clone()).unwrap();
        assert!(!Path::new("/proc").join(pid.trim()).exists(), "process {pid} is still there");
    };
    let (ended, kept) = kept(order(&format!("{deaf}; exit 4"), LONG)).await;
    assert_eq!((ended.exit_code, ended.timed_out), (4, false));
    assert!(ended.took < Duration::from_secs(2), "nobody waits for it: {ended:?}");
    gone(&kept);
    // SIGTERM ends the program itself at once; who is deaf has the five seconds.
    let (ended, kept) = self::kept(order(&format!("{deaf}; sleep 600"), Duration::from_millis(300))).await;
    assert_eq!((ended.exit_code, ended.timed_out), (124, true));
    assert!(ended.took >= Duration::from_secs(5), "{ended:?}");
    gone(&kept);
    // Who hears it has the time to say so.
    let place = tempfile::tempdir().unwrap();
    let told = place.path().join("told");
    let hears = format!(
        "sh -c 'trap \"sleep 0.5; touch {}; exit\" TERM; while :; do sleep 0.1; done' >/dev/null 2>&1 & echo",
        told.display()
    );
    let (ended, _) = self::kept(order(&format!("{hears}; sleep 600"), Duration::from_millis(300))).await;
    assert!(ended.timed_out && ended.took < Duration::from_secs(5), "{ended:?}");
    assert!(told.exists(), "it was not given its grace");
}

/// A client that pauses for longer than those who linger may stay gets everything that they say all the same.
#[tokio::test]
async fn a_slow_client_loses_nothing() {
    struct Slow(Vec<u8>);
    impl Sink for Slow {
        async fn take(&mut self, _: Stream, bytes: &[u8]) -> bool {
            if self.0.is_empty() {
                tokio::time::sleep(Duration::from_secs(4)).await;
            }
            self.0.extend_from_slice(bytes);
            true
        }
        async fn gone(&mut self) {
            std::future::pending().await
        }
    }
    let mut sink = Slow(Vec::new());
    // The program itself has ended when the first of these bytes come.
    let later =
        "(while kill -0 $$ 2>/dev/null; do sleep 0.01; done; sleep 0.2; head -c 1000000 /dev/zero; echo end) & exit 6";
    let ended = run(order(later, LONG), &mut sink).await.unwrap();
    assert_eq!((ended.exit_code, ended.timed_out, ended.client_gone), (6, false, false));
    assert!(sink.0.len() == 1_000_004 && sink.0.ends_with(b"end\n"), "{} bytes", sink.0.len());
}

/// What a program leaves behind may not hold a request for ever.
#[tokio::test]
async fn what_lingers_on_the_outputs_is_ended() {
    let (ended, kept) = kept(order("sleep 600 & echo $!", LONG)).await;
    assert_eq!((ended.exit_code, ended.timed_out), (0, false));
    assert!(ended.took < Duration::from_secs(20), "{ended:?}");
    until_gone(&String::from_utf8(kept.stdout).unwrap()).await;
}

/// Who fills the disk is told to end, may take away what it has begun, and says why it ended.
#[tokio::test]
async fn a_directory_that_grows_too_large_ends_its_program() {
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("large");
    let script = format!(
        "trap 'rm {0}; exit 0' TERM; head -c 3000000 /dev/zero > {0}; while :; do sleep 0.1; done",
        file.display()
    );
    let room = Some((place.path().to_owned(), 2_000_000));
    let (ended, kept) = kept(Order { room, ..order(&script, LONG) }).await;
    assert_eq!((ended.exit_code, ended.timed_out, ended.client_gone), (128, false, false));
    assert!(String::from_utf8(kept.stderr).unwrap().contains("EXEC_CLONE_MAX_BYTES"));
    assert!(!file.exists() && ended.took < Duration::from_secs(20), "{ended:?}");
    // Room enough.
    let room = Some((place.path().to_owned(), 20_000_000));
    let script = format!("head -c 3000000 /dev/zero > {}; sleep 0.5; exit 3", file.display());
    assert_eq!(self::kept(Order { room, ..order(&script, LONG) }).await.0.exit_code, 3);
}
