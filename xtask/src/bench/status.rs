//! `status`: how many requests for the status a service answers in a second, each signed in with a token, over connections
//! that are kept.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use replank_testbed::cleanup;
use replank_testbed::remains::Scratch;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::service::Service;
use super::{Options, percentile, round};

const CONNECTIONS: usize = 32;
/// Caches are warm and the processors awake by then.
const WARM: Duration = Duration::from_secs(1);
const MEASURED: Duration = Duration::from_secs(10);
/// A row is some kilobytes; a longer answer is none.
const ANSWER_MAX: usize = 64 * 1024;

pub(super) fn run(options: &Options, replank: PathBuf) -> Result<ExitCode> {
    cleanup::on_signals()?;
    let scratch = Scratch::create()?;
    let service = Service::start(&replank, &scratch.path().join("home"), None)?;
    let request = format!(
        "GET /api/upgrade/status HTTP/1.1\r\nHost: {}\r\nAuthorization: Bearer {}\r\n\r\n",
        service.address, service.token
    );
    let request: Arc<[u8]> = request.into_bytes().into();
    // One thread: the client shares the machine with what it measures.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut took = runtime.block_on(load(service.address, &request))?;
    let requests_per_s = round(took.len() as f64 / MEASURED.as_secs_f64());
    let p99_ms = round(percentile(&mut took, 0.99));
    if options.json {
        println!("{}", json!({"requests_per_s": requests_per_s, "p99_ms": p99_ms}));
    } else {
        println!("{requests_per_s} requests/s, 99th percentile {p99_ms} ms ({CONNECTIONS} connections)");
    }
    Ok(ExitCode::SUCCESS)
}

/// Milliseconds of each request within the measured time.
async fn load(address: SocketAddr, request: &Arc<[u8]>) -> Result<Vec<f64>> {
    let (counted, over) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let mut connections = Vec::new();
    for _ in 0..CONNECTIONS {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        connections.push(tokio::spawn(ask(stream, request.clone(), counted.clone(), over.clone())));
    }
    tokio::time::sleep(WARM).await;
    counted.store(true, Ordering::Relaxed);
    tokio::time::sleep(MEASURED).await;
    over.store(true, Ordering::Relaxed);
    let mut all = Vec::new();
    for connection in connections {
        all.extend(connection.await??);
    }
    Ok(all)
}

async fn ask(
    mut stream: TcpStream,
    request: Arc<[u8]>,
    counted: Arc<AtomicBool>,
    over: Arc<AtomicBool>,
) -> Result<Vec<f64>> {
    let mut took = Vec::new();
    let mut answer = vec![0; ANSWER_MAX];
    while !over.load(Ordering::Relaxed) {
        let begun = Instant::now();
        stream.write_all(&request).await?;
        let (mut have, mut need) = (0, None);
        while need.is_none_or(|need| have < need) {
            ensure!(have < ANSWER_MAX, "an answer does not end");
            let more = stream.read(&mut answer[have..]).await?;
            ensure!(more > 0, "the service closes a connection");
            have += more;
            if need.is_none() {
                need = whole(&answer[..have])?;
            }
        }
        if counted.load(Ordering::Relaxed) {
            took.push(begun.elapsed().as_secs_f64() * 1_000.0);
        }
    }
    Ok(took)
}

/// How long the answer is, once its head has come; anything but a status is an error.
fn whole(bytes: &[u8]) -> Result<Option<usize>> {
    let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else { return Ok(None) };
    let head = std::str::from_utf8(&bytes[..end])?;
    ensure!(head.starts_with("HTTP/1.1 200"), "the service answers {:?}", head.lines().next());
    let length =
        head.lines().find_map(|line| line.strip_prefix("content-length: ")).context("an answer without a length")?;
    Ok(Some(end + 4 + length.trim().parse::<usize>()?))
}
