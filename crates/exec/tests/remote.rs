//! The remote's addresses: asked for once, judged, pinned, and what happens where they cannot be had.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use replank_exec::outbound::{Reach, Resolver};
use replank_exec::server::remote::{Remote, Unreached};
use serde_json::json;
use support::Rig;

/// Answers with these, or that there is no such name.
#[derive(Debug)]
struct Says(Option<Vec<SocketAddr>>, AtomicUsize);

impl Says {
    fn new(addresses: &[&str]) -> Self {
        Self(Some(addresses.iter().map(|text| text.parse().unwrap()).collect()), AtomicUsize::default())
    }
}

#[async_trait]
impl Resolver for Says {
    async fn resolve(&self, _: &str, _: u16) -> std::io::Result<Vec<SocketAddr>> {
        self.1.fetch_add(1, Ordering::SeqCst);
        self.0.clone().ok_or_else(|| std::io::Error::other("no such name"))
    }
}

const CLOSED: Reach = Reach { loopback: false, private: false };
const PRIVATE: Reach = Reach { loopback: false, private: true };
const OPEN: Reach = Reach { loopback: true, private: true };
const URL: &str = "https://user:hunter2@git.example.com/a.git";

#[tokio::test]
async fn addresses_are_judged_and_pinned() {
    let check = async |url: &str, reach: Reach, answers: &[&str], expect: Result<Option<&str>, &str>| {
        let remote = Remote::read(url, reach).unwrap();
        let found = remote.pin(&Says::new(answers), &BTreeMap::new()).await;
        match (&found, expect) {
            (Ok(pin), Ok(expect)) if pin.as_deref() == expect => {}
            (Err(why), Err(part)) if why.to_string().contains(part) => {}
            _ => panic!("{url} {reach:?} {answers:?}: {found:?}"),
        }
    };
    let public = "140.82.121.4:443";
    check(URL, CLOSED, &[public], Ok(Some("git.example.com:443:140.82.121.4"))).await;
    let both = ["140.82.121.4:8443", "[2606:50c0:8000::154]:8443"];
    let pin = "git.example.com:8443:140.82.121.4,[2606:50c0:8000::154]";
    check("https://GIT.example.com:8443/a.git", CLOSED, &both, Ok(Some(pin))).await;
    // Nobody has to be asked.
    check("https://140.82.121.4/a.git", CLOSED, &[], Ok(None)).await;
    check(URL, CLOSED, &[], Err("it has no address")).await;
    // One bad address among good ones refuses them all.
    for (bad, why) in [
        ("127.0.0.1:443", "this machine itself, and loopback remotes are not allowed; EXEC_ALLOW_LOOPBACK_REMOTE=true"),
        ("[::1]:443", "this machine itself"),
        ("[::ffff:127.0.0.1]:443", "this machine itself"),
        ("10.1.2.3:443", "a private address, and private remotes are not allowed; EXEC_ALLOW_PRIVATE_REMOTE=true"),
        ("169.254.169.254:443", "metadata service"),
        ("168.63.129.16:443", "metadata service"),
        ("0.0.0.0:443", "an unspecified address"),
        ("[fe80::1]:443", "a link-local address"),
    ] {
        check(URL, CLOSED, &[bad], Err(why)).await;
        check(URL, CLOSED, &[public, bad], Err(why)).await;
    }
    check(URL, PRIVATE, &["10.1.2.3:443"], Ok(Some("git.example.com:443:10.1.2.3"))).await;
    check(URL, PRIVATE, &["127.0.0.1:443"], Err("this machine itself")).await;
    check(URL, OPEN, &["127.0.0.1:443"], Ok(Some("git.example.com:443:127.0.0.1"))).await;
    check(URL, OPEN, &["169.254.169.254:443"], Err("metadata service")).await;
    check("http://git.example.com/a.git", OPEN, &["127.0.0.1:80"], Ok(Some("git.example.com:80:127.0.0.1"))).await;
    check("http://git.example.com/a.git", OPEN, &["140.82.121.4:80"], Err("http shows everything")).await;
}

/// Behind a proxy a name that only the proxy knows is no reason to refuse; anything else that goes wrong still is.
#[tokio::test]
async fn a_proxy_resolves_for_itself() {
    let check = async |url: &str, own: &[(&str, &str)], is_behind: bool| {
        let remote = Remote::read(url, OPEN).unwrap();
        let own: BTreeMap<OsString, OsString> = own.iter().map(|(n, v)| (n.into(), v.into())).collect();
        let unknown = remote.pin(&Says(None, AtomicUsize::default()), &own).await;
        match unknown {
            Ok(None) if is_behind => {}
            Err(Unreached::Unresolved(..)) if !is_behind => {}
            other => panic!("{url} {own:?}: {other:?}"),
        }
        let bad = remote.pin(&Says::new(&["169.254.169.254:443"]), &own).await;
        assert!(matches!(bad, Err(Unreached::Refused(_))), "{bad:?}");
    };
    let (https, http) = ("https://git.example.com/a.git", "http://git.example.com/a.git");
    let proxy = ("https_proxy", "http://proxy:3128");
    check(https, &[], false).await;
    check(https, &[proxy], true).await;
    check(https, &[("HTTPS_PROXY", "http://proxy:3128")], true).await;
    check(https, &[("https_proxy", "")], false).await;
    check(https, &[("http_proxy", "http://proxy:3128")], false).await;
    check(http, &[("http_proxy", "http://proxy:3128")], true).await;
    check(http, &[proxy], false).await;
    for (excepted, is_behind) in [
        ("localhost,127.0.0.1", true),
        ("", true),
        ("example.org, other.example.com", true),
        ("le.com", true),
        ("git.example.com", false),
        ("localhost, .example.com", false),
        ("EXAMPLE.com", false),
        ("example.com:443", false),
        ("*.example.com", false),
        ("*", false),
    ] {
        check(https, &[proxy, ("no_proxy", excepted)], is_behind).await;
        check(https, &[proxy, ("NO_PROXY", excepted)], is_behind).await;
    }
}

/// Through the server: forbidden addresses are a refusal by both routes, for the commands that talk and for no others; the
/// name is asked for once for each of them.
#[tokio::test]
async fn the_server_asks_before_git_does() {
    let url = "https://git.example.com/a.git";
    let says = Arc::new(Says::new(&["127.0.0.1:443"]));
    let rig = Rig::start_with(&[("UPGRADE_GIT_REMOTE", url)], &[], says.clone()).await;
    let clone = rig.clones().join("job-1");
    std::fs::create_dir(&clone).unwrap();
    let target = rig.clones().join("job-2");
    for request in [
        json!({"argv": ["git", "ls-remote", url]}),
        json!({"argv": ["git", "clone", url, target]}),
        json!({"argv": ["git", "fetch", "--depth", "1", "origin", "main"], "cwd": clone}),
        json!({"argv": ["git", "ls-remote", "origin"], "cwd": clone}),
    ] {
        for path in ["/exec", "/exec/stream"] {
            let before = says.1.load(Ordering::SeqCst);
            let (status, _, body) = rig.post(path, &request).await;
            assert!(status == 403 && body.contains("127.0.0.1 is this machine itself"), "{request}: {status} {body}");
            assert_eq!(says.1.load(Ordering::SeqCst), before + 1, "{request}");
        }
    }
    let before = says.1.load(Ordering::SeqCst);
    for words in [&["status"][..], &["rev-parse", "HEAD"], &["config", "--get", "remote.origin.url"]] {
        let request = json!({"argv": ([&["git"], words].concat()), "cwd": clone});
        assert_eq!(rig.post("/exec", &request).await.0, 200, "{words:?}");
    }
    assert_eq!(
        rig.post("/exec", &json!({"argv": ["git", "ls-remote", "https://evil.example.com/a.git"]})).await.0,
        403
    );
    assert_eq!(says.1.load(Ordering::SeqCst), before, "nobody needed to know");
}
