//! The control socket: generations, what is kept, the fallback, tunnels, and who may open it.

use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;

use http::{Method, StatusCode};
use replank::proxy::Limits;
use replank_adapters::platform::docker::proxy_api::{Protocol, ROUTES, Routes, SOCKET};
use tokio::io::AsyncWriteExt as _;
use tokio::net::UnixStream;

use crate::rig::{App, Rig, control, head, id, listener, put, raw_exchange, routes, say, side, soon, start, state};

#[tokio::test]
async fn generations_are_refused_or_taken() {
    let rig = Rig::web().await;
    assert_eq!(rig.state().await.routes, None);
    for (generation, digit, expect, serving) in [
        (5, 'a', StatusCode::OK, "rev-a"),
        (5, 'a', StatusCode::OK, "rev-a"),
        (5, 'b', StatusCode::CONFLICT, "rev-a"),
        (4, 'b', StatusCode::CONFLICT, "rev-a"),
        (4, 'a', StatusCode::CONFLICT, "rev-a"),
        (6, 'b', StatusCode::OK, "rev-b"),
        (5, 'a', StatusCode::CONFLICT, "rev-b"),
        (9, 'a', StatusCode::OK, "rev-a"),
    ] {
        let (status, text) = rig.put(&routes(generation, digit)).await;
        assert_eq!(status, expect, "{generation} {digit}: {text}");
        let answered: replank_adapters::platform::docker::proxy_api::State = serde_json::from_str(&text).unwrap();
        assert_eq!(answered.serving.as_deref(), Some(serving), "{generation} {digit}");
        assert_eq!(answered, rig.state().await);
    }
}

#[tokio::test]
async fn senseless_routes_are_refused_in_words() {
    let rig = Rig::web().await;
    rig.route(1, 'a').await;
    let changed = |change: fn(&mut Routes)| {
        let mut routes = routes(2, 'b');
        change(&mut routes);
        serde_json::to_vec(&routes).unwrap()
    };
    for (body, word) in [
        (changed(|r| r.primary = side('b', &["api"])), "\"api\""),
        (changed(|r| r.fallback = Some(side('b', &["api"]))), "\"api\""),
        (changed(|r| r.primary.backends.clear()), "no backend"),
        (changed(|r| r.primary.revision.clear()), "no revision"),
        (changed(|r| r.primary.backends.get_mut("web").unwrap().container = "10.0.0.1".to_owned()), "container id"),
        (changed(|r| r.primary.backends.get_mut("web").unwrap().container = String::new()), "container id"),
        (changed(|r| r.primary.backends.get_mut("web").unwrap().port = 0), "port 0"),
        (b"{".to_vec(), "no routes"),
        (vec![b' '; 300 * 1024], "whole"),
    ] {
        let (status, text) = soon(control(rig.dir.path(), Method::PUT, "/routes", body)).await.unwrap();
        assert_eq!(status, StatusCode::BAD_REQUEST, "{text}");
        assert!(text.contains("\"detail\"") && text.replace("\\\"", "\"").contains(word), "{word}: {text}");
    }
    assert_eq!(rig.state().await.routes, Some(routes(1, 'a')));
}

#[tokio::test]
async fn a_restart_serves_what_was_kept_and_the_fallback_until_told_again() {
    let rig = Rig::web().await;
    let (_a, _b) = (App::start(&rig.names, 'a').await, App::start(&rig.names, 'b').await);
    let ask = "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    rig.route(1, 'a').await;
    let trial = Routes { fallback: Some(side('a', &["web"])), ..routes(2, 'b') };
    assert_eq!(rig.put(&trial).await.0, StatusCode::OK);
    assert!(raw_exchange(&rig, ask).await.ends_with('b'), "the primary serves before any restart");

    let again = async |rig: Rig| {
        let Rig { dir, names, proxy } = rig;
        proxy.stop().await;
        Rig::on(dir, names, Limits::default()).await
    };
    let rig = again(rig).await;
    assert_eq!(rig.state().await.routes.as_ref(), Some(&trial));
    assert_eq!(rig.state().await.serving.as_deref(), Some("rev-a"));
    assert!(raw_exchange(&rig, ask).await.ends_with('a'), "the fallback serves after it");
    assert_eq!(rig.put(&routes(1, 'b')).await.0, StatusCode::CONFLICT);
    assert!(raw_exchange(&rig, ask).await.ends_with('a'), "a refusal confirms nothing");
    assert_eq!(rig.put(&trial).await.0, StatusCode::OK);
    assert!(raw_exchange(&rig, ask).await.ends_with('b'), "the same routes again confirm them");

    let rig = again(rig).await;
    assert_eq!(rig.state().await.serving.as_deref(), Some("rev-a"), "each restart asks anew");
    rig.route(3, 'b').await;
    let rig = again(rig).await;
    assert_eq!(rig.state().await.serving.as_deref(), Some("rev-b"), "settled routes survive");
}

#[tokio::test]
async fn routes_that_cannot_be_kept_are_not_taken() {
    let rig = Rig::web().await;
    rig.route(1, 'a').await;
    // A directory in the way of the rename: works as root too, unlike permissions.
    let file = rig.dir.path().join(ROUTES);
    std::fs::remove_file(&file).unwrap();
    std::fs::create_dir(&file).unwrap();
    std::fs::write(file.join("x"), "").unwrap();
    assert_eq!(rig.put(&routes(2, 'b')).await.0, StatusCode::INTERNAL_SERVER_ERROR);
    assert_eq!(rig.state().await.serving.as_deref(), Some("rev-a"));
    std::fs::remove_dir_all(&file).unwrap();
    assert_eq!(rig.put(&routes(2, 'b')).await.0, StatusCode::OK);
}

#[tokio::test]
async fn unreadable_kept_routes_serve_nothing_and_can_be_put_right() {
    let dir = tempfile::tempdir().unwrap();
    crate::rig::configure(dir.path(), &[("web", listener(Protocol::Http))]);
    std::fs::write(dir.path().join(ROUTES), "{\"generation\": 1, \"prim").unwrap();
    let rig = Rig::on(dir, Arc::default(), Limits::default()).await;
    assert_eq!(rig.state().await.serving, None);
    assert!(raw_exchange(&rig, "GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.starts_with("HTTP/1.1 503 "));
    rig.route(1, 'a').await;
}

#[tokio::test]
async fn tunnels_reach_containers_by_id_only() {
    let rig = Rig::web().await;
    let _b = App::start(&rig.names, 'b').await;
    let connect = async |target: &str| {
        let mut stream = UnixStream::connect(rig.dir.path().join(SOCKET)).await.unwrap();
        stream.write_all(format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n").as_bytes()).await.unwrap();
        let head = head(&mut stream).await;
        (stream, head)
    };
    for (target, expect) in [
        ("127.0.0.1:80".to_owned(), "400"),
        ("localhost:80".to_owned(), "400"),
        (format!("{}:0", id('b')), "400"),
        (format!("{}:80", id('c')), "502"),
    ] {
        let (_, head) = connect(&target).await;
        assert!(head.starts_with(&format!("HTTP/1.1 {expect} ")), "{target}: {head}");
    }
    let (mut tunnel, head_of_tunnel) = connect(&format!("{}:80", id('b'))).await;
    assert!(head_of_tunnel.starts_with("HTTP/1.1 200 "), "{head_of_tunnel}");
    tunnel
        .write_all(b"GET /upgrade HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        .await
        .unwrap();
    assert!(head(&mut tunnel).await.starts_with("HTTP/1.1 101 "));
    assert_eq!(say(&mut tunnel, "probe").await, "bprobe");
    assert_eq!(rig.open().await, [(id('b'), 1)].into());
    drop(tunnel);
    rig.closed().await;
}

#[tokio::test]
async fn one_proxy_per_directory_behind_a_private_socket() {
    let rig = Rig::web().await;
    let mode = std::fs::metadata(rig.dir.path().join(SOCKET)).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let error = start(rig.dir.path(), &rig.names, Limits::default()).await.unwrap_err();
    assert!(format!("{error:#}").contains("another proxy runs on"), "{error:#}");
    rig.route(1, 'a').await;
    // The refused one took nothing away.
    assert_eq!(put(rig.dir.path(), &routes(1, 'a')).await.0, StatusCode::OK);
    assert_eq!(state(rig.dir.path()).await.serving.as_deref(), Some("rev-a"));
}
