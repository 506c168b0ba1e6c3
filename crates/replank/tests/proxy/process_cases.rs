//! The program itself: killed at any moment, asked to stop, asked for its health.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use replank_adapters::platform::docker::proxy_api::{Protocol, ROUTES, Routes, SOCKET};

use crate::rig::{configure, control, listener, routes, state, until};

fn replank(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_replank"));
    command.args(["proxy", "--dir"]).arg(dir).stdin(Stdio::null()).stderr(Stdio::null());
    command
}

async fn started(dir: &Path) -> Child {
    let child = replank(dir).spawn().unwrap();
    until("the proxy answers", async || control(dir, http::Method::GET, "/state", vec![]).await.is_ok()).await;
    child
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_any_moment_it_keeps_the_old_or_the_new_routes() {
    const ROUNDS: u64 = 15;
    let dir = tempfile::tempdir().unwrap();
    configure(dir.path(), &[("web", listener(Protocol::Http))]);
    let (mut generation, mut socket_left) = (0, false);
    for round in 0..ROUNDS {
        let mut child = started(dir.path()).await;
        if generation > 0 {
            let kept = state(dir.path()).await.routes.unwrap().generation;
            assert!(kept >= generation, "generation {generation} was acknowledged, {kept} was kept");
            generation = kept;
        }
        let acknowledged = Arc::new(AtomicU64::new(generation));
        let (path, told) = (dir.path().to_owned(), Arc::clone(&acknowledged));
        let putting = tokio::spawn(async move {
            for next in generation + 1.. {
                let body = serde_json::to_vec(&routes(next, if next.is_multiple_of(2) { 'a' } else { 'b' })).unwrap();
                match control(&path, http::Method::PUT, "/routes", body).await {
                    Ok((status, text)) => assert_eq!(status, http::StatusCode::OK, "{text}"),
                    Err(_) => return next,
                }
                told.store(next, Ordering::SeqCst);
            }
            unreachable!("generations do not end")
        });
        // Another moment in each round.
        until("routes were put", async || acknowledged.load(Ordering::SeqCst) > generation + round).await;
        tokio::time::sleep(std::time::Duration::from_micros(round * 137)).await;
        child.kill().unwrap();
        child.wait().unwrap();
        let unanswered = putting.await.unwrap();
        generation = acknowledged.load(Ordering::SeqCst);
        let kept: Routes = serde_json::from_slice(&std::fs::read(dir.path().join(ROUTES)).unwrap()).unwrap();
        assert!((generation..=unanswered).contains(&kept.generation));
        assert_eq!(kept, routes(kept.generation, if kept.generation.is_multiple_of(2) { 'a' } else { 'b' }));
        socket_left |= dir.path().join(SOCKET).exists();
    }
    assert!(socket_left, "a kill should leave the socket behind for the next one to replace");
}

#[tokio::test]
async fn it_says_whether_it_is_there_and_stops_when_asked() {
    let dir = tempfile::tempdir().unwrap();
    configure(dir.path(), &[("web", listener(Protocol::Http))]);
    let check = || replank(dir.path()).arg("--check").status().unwrap().success();
    assert!(!check());
    let mut child = started(dir.path()).await;
    assert!(check());
    assert!(!replank(dir.path()).status().unwrap().success(), "a second one is refused");
    let pid = rustix::process::Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let status = crate::rig::soon(tokio::task::spawn_blocking(move || child.wait())).await.unwrap().unwrap();
    assert_eq!(status.code(), Some(0));
    assert!(!check());
}
