//! TLS: both HTTPs by ALPN, certificates taken anew, bad files without effect.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use replank::proxy::Limits;
use replank_adapters::platform::docker::proxy_api::{Protocol, TlsFiles};
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::rig::{App, Rig, configure, listener, start, until};

fn write_certificate(dir: &Path) -> CertificateDer<'static> {
    let made = rcgen::generate_simple_self_signed(["shop.example".to_owned()]).unwrap();
    std::fs::write(dir.join("key.pem"), made.signing_key.serialize_pem()).unwrap();
    std::fs::write(dir.join("cert.pem"), made.cert.pem()).unwrap();
    made.cert.der().clone()
}

async fn connect(
    rig: &Rig,
    trust: &CertificateDer<'static>,
    alpn: &str,
) -> std::io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(trust.clone()).unwrap();
    let mut config = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![alpn.as_bytes().to_vec()];
    let stream = rig.raw("web").await;
    tokio_rustls::TlsConnector::from(Arc::new(config))
        .connect(ServerName::try_from("shop.example").unwrap(), stream)
        .await
}

#[tokio::test]
async fn certificates_are_used_and_replaced_while_serving() {
    let dir = tempfile::tempdir().unwrap();
    let first = write_certificate(dir.path());
    let path = |name: &str| dir.path().join(name).display().to_string();
    let tls = TlsFiles { certificate: path("cert.pem"), key: path("key.pem") };
    let web = replank_adapters::platform::docker::proxy_api::Listener { tls: Some(tls), ..listener(Protocol::Http) };
    let limits = Limits { tls_reload: Duration::from_millis(50), ..Limits::default() };
    configure(dir.path(), &[("web", web)]);
    let rig = Rig::on(dir, Arc::default(), limits.clone()).await;
    let _a = App::start(&rig.names, 'a').await;
    rig.route(1, 'a').await;

    let mut one = connect(&rig, &first, "http/1.1").await.unwrap();
    one.write_all(b"GET /headers HTTP/1.1\r\nHost: shop.example\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    one.read_to_string(&mut answer).await.unwrap();
    assert!(answer.contains("x-forwarded-proto: https"), "{answer}");

    let two = connect(&rig, &first, "h2").await.unwrap();
    assert_eq!(two.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(two)).await.unwrap();
    tokio::spawn(connection);
    let request = Request::post("https://shop.example/").body(Full::new(Bytes::from("four"))).unwrap();
    let answer = sender.send_request(request).await.unwrap().into_body().collect().await.unwrap().to_bytes();
    assert_eq!(&answer[..], b"a 4");

    // Rubbish and a key that does not fit leave the first one in use.
    let dir = rig.dir.path();
    std::fs::write(dir.join("cert.pem"), "rubbish").unwrap();
    tokio::time::sleep(limits.tls_reload * 4).await;
    connect(&rig, &first, "h2").await.unwrap();
    let second = write_certificate(dir);
    until("the second certificate is in use", async || connect(&rig, &second, "h2").await.is_ok()).await;
    assert!(connect(&rig, &first, "h2").await.is_err());
    // Whoever is connected stays connected.
    let request = Request::get("https://shop.example/").body(Full::default()).unwrap();
    assert!(sender.send_request(request).await.unwrap().status().is_success());
}

#[tokio::test]
async fn a_missing_certificate_is_one_clear_error() {
    let dir = tempfile::tempdir().unwrap();
    let tls = TlsFiles { certificate: "/nowhere/cert.pem".to_owned(), key: "/nowhere/key.pem".to_owned() };
    let web = replank_adapters::platform::docker::proxy_api::Listener { tls: Some(tls), ..listener(Protocol::Http) };
    configure(dir.path(), &[("web", web)]);
    let error = start(dir.path(), &Arc::default(), Limits::default()).await.unwrap_err();
    let text = format!("{error:#}");
    assert!(text.contains("\"web\"") && text.contains("/nowhere/cert.pem"), "{text}");
}
