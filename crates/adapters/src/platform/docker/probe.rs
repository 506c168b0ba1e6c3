//! Probes: does a container answer, and is it the version that it should be? Asked so that no cache can answer instead.

use std::time::Duration;

use bytes::Bytes;
use http::{Request, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use replank_core::words::Version;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;

use super::config::{ProbeConfig, VersionProof};

/// Most of a body that a version proof is looked for in.
pub(super) const BODY_MAX: usize = 64 * 1024;
/// Query parameter with a random value: no cache has seen that address before (lesson 18).
const NONCE_PARAMETER: &str = "replank-probe";

/// One request over a connection that is there already. `Err` says in words what is wrong with the answer.
pub(super) async fn ask<Io>(io: Io, probe: &ProbeConfig, host: &str, version: &Version) -> Result<(), String>
where
    Io: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let patience = Duration::from_millis(probe.timeout_ms);
    timeout(patience, answer(io, probe, host, version))
        .await
        .map_err(|_| format!("did not answer within {} ms", probe.timeout_ms))?
}

async fn answer<Io>(io: Io, probe: &ProbeConfig, host: &str, version: &Version) -> Result<(), String>
where
    Io: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let broke = |error: hyper::Error| format!("broke the connection off: {error}");
    let (mut sender, connection) = http1::handshake(TokioIo::new(io)).await.map_err(broke)?;
    let driver = tokio::spawn(connection);
    let _stop = AbortOnDrop(driver.abort_handle());
    let request = Request::get(target(&probe.path)?)
        .header(header::HOST, host)
        .header(header::CACHE_CONTROL, "no-cache")
        .header(header::PRAGMA, "no-cache")
        .header(header::CONNECTION, "close")
        .header(header::USER_AGENT, concat!("replank-probe/", env!("CARGO_PKG_VERSION")))
        .body(Empty::<Bytes>::new())
        .map_err(|error| format!("cannot be asked: {error}"))?;
    let answer = sender.send_request(request).await.map_err(broke)?;
    let status = answer.status().as_u16();
    if !(probe.expect_status.from..=probe.expect_status.to).contains(&status) {
        return Err(format!(
            "answered status {status}, expected {}",
            match (probe.expect_status.from, probe.expect_status.to) {
                (from, to) if from == to => from.to_string(),
                (from, to) => format!("{from} to {to}"),
            }
        ));
    }
    let wanted = version.to_string();
    match &probe.version {
        VersionProof::None => Ok(()),
        VersionProof::Header(name) => {
            let found = answer.headers().get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
            same(found.as_deref(), &wanted, &format!("header {name}"))
        }
        VersionProof::JsonPointer(pointer) => {
            let body = body(answer.into_body()).await?;
            let value: serde_json::Value =
                serde_json::from_slice(&body).map_err(|_| "answered with a body that is not JSON".to_owned())?;
            same(value.pointer(pointer).and_then(|v| v.as_str()), &wanted, pointer)
        }
        VersionProof::Pattern(pattern) => {
            let body = body(answer.into_body()).await?;
            let found = contains(&String::from_utf8_lossy(&body), pattern, &wanted);
            if found { Ok(()) } else { Err(format!("does not show version {wanted} where it should")) }
        }
    }
}

async fn body(body: hyper::body::Incoming) -> Result<Bytes, String> {
    match Limited::new(body, BODY_MAX).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(_) => Err(format!("answered with a broken body, or one above {BODY_MAX} bytes")),
    }
}

/// The path with a parameter of its own; a query that is there is kept.
fn target(path: &str) -> Result<String, String> {
    let mut nonce = [0_u8; 8];
    getrandom::fill(&mut nonce).map_err(|error| format!("cannot be asked without random numbers: {error}"))?;
    let joint = if path.contains('?') { '&' } else { '?' };
    Ok(format!("{path}{joint}{NONCE_PARAMETER}={:016x}", u64::from_be_bytes(nonce)))
}

fn same(found: Option<&str>, wanted: &str, place: &str) -> Result<(), String> {
    match found.map(str::trim) {
        Some(text) if text.strip_prefix('v').unwrap_or(text) == wanted => Ok(()),
        // The other version is worth telling; anything else that an application writes there is not.
        Some(text) => match text.parse::<Version>() {
            Ok(other) => Err(format!("answers as version {other}, expected {wanted}")),
            Err(_) => Err(format!("tells no version in {place}, expected {wanted}")),
        },
        None => Err(format!("has no {place}, expected version {wanted}")),
    }
}

/// The pattern with the version in it, the version not being the beginning or the end of a longer one.
fn contains(text: &str, pattern: &str, version: &str) -> bool {
    let Some((before, after)) = pattern.split_once("{version}") else { return false };
    let needle = format!("{before}{version}{after}");
    let word = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    text.match_indices(&needle).any(|(at, _)| {
        let head = text[..at].chars().next_back();
        let mut tail = text[at + needle.len()..].chars();
        let (next, second) = (tail.next(), tail.next());
        // "1.2.3." may end a sentence; "1.2.3.4" is another version.
        let longer = next.is_some_and(word) || (next == Some('.') && second.is_some_and(word));
        let shorter = head.is_some_and(|c| c == '.' || (word(c) && c != 'v'));
        let another = (after.is_empty() && longer) || (before.is_empty() && shorter);
        !another
    })
}

/// A probe that was given up leaves no connection behind.
struct AbortOnDrop(tokio::task::AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_is_not_fooled_by_a_longer_version() {
        for (text, pattern, expect) in [
            ("version 1.2.3", "version {version}", true),
            ("version 1.2.3.", "version {version}", true),
            ("version 1.2.30", "version {version}", false),
            ("version 1.2.3.4", "version {version}", false),
            ("version 1.2.3-commit.0123456", "version {version}", false),
            ("version 1.2.4", "version {version}", false),
            ("<b>1.2.3</b>", "<b>{version}</b>", true),
            ("11.2.3", "{version}", false),
            ("v1.2.3", "{version}", true),
            ("0.1.2.3", "{version}", false),
            ("1.2.30 and 1.2.3", "{version}", true),
        ] {
            assert_eq!(contains(text, pattern, "1.2.3"), expect, "{text:?} {pattern:?}");
        }
    }

    async fn against(reply: &str, probe: ProbeConfig) -> (Result<(), String>, String) {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let (ours, mut theirs) = tokio::io::duplex(256 * 1024);
        let reply = reply.to_owned();
        let server = tokio::spawn(async move {
            let mut seen = vec![0; 4096];
            let n = theirs.read(&mut seen).await.expect("read");
            theirs.write_all(reply.as_bytes()).await.expect("write");
            theirs.shutdown().await.expect("shutdown");
            String::from_utf8_lossy(&seen[..n]).into_owned()
        });
        let result = ask(ours, &probe, "api", &"1.2.3".parse().expect("version")).await;
        (result, server.await.expect("server"))
    }

    #[tokio::test]
    async fn answers_are_judged_by_status_and_version() {
        let with = |version: VersionProof| ProbeConfig { version, ..ProbeConfig::http(80, "/health?deep=1") };
        let json = VersionProof::JsonPointer("/build/version".to_owned());
        let header = VersionProof::Header("x-version".to_owned());
        let huge = format!("HTTP/1.1 200 OK\r\n\r\n{{\"build\":\"{}\"}}", "x".repeat(BODY_MAX));
        for (reply, probe, expect) in [
            ("HTTP/1.1 200 OK\r\n\r\n", with(VersionProof::None), Ok(())),
            ("HTTP/1.1 204 No Content\r\n\r\n", with(VersionProof::None), Ok(())),
            ("HTTP/1.1 302 Found\r\nlocation: /x\r\n\r\n", with(VersionProof::None), Err("status 302")),
            ("HTTP/1.1 503 No\r\n\r\n", with(VersionProof::None), Err("status 503, expected 200 to 299")),
            ("HTTP/1.1 200 OK\r\nX-Version: v1.2.3\r\n\r\n", with(header.clone()), Ok(())),
            ("HTTP/1.1 200 OK\r\nx-version: 1.2.2\r\n\r\n", with(header.clone()), Err("as version 1.2.2")),
            ("HTTP/1.1 200 OK\r\n\r\n", with(header), Err("has no header")),
            ("HTTP/1.1 200 OK\r\n\r\n{\"build\":{\"version\":\"1.2.3\"}}", with(json.clone()), Ok(())),
            ("HTTP/1.1 200 OK\r\n\r\n{\"build\":{\"version\":123}}", with(json.clone()), Err("has no /build/version")),
            ("HTTP/1.1 200 OK\r\n\r\n<html>", with(json.clone()), Err("not JSON")),
            (huge.as_str(), with(json), Err("above 65536 bytes")),
            ("nonsense\r\n\r\n", with(VersionProof::None), Err("broke the connection off")),
        ] {
            let (result, request) = against(reply, probe).await;
            match (&result, expect) {
                (Ok(()), Ok(())) => {}
                (Err(found), Err(wanted)) if found.contains(wanted) => {}
                other => panic!("{reply:.60?}: {other:?}"),
            }
            assert!(request.starts_with("GET /health?deep=1&replank-probe="), "{request}");
            assert!(request.contains("cache-control: no-cache"), "{request}");
        }
    }
}
