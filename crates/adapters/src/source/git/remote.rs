//! The URL rule of contract §2: what a remote may look like, and what of it may be shown.

use std::fmt;
use std::net::IpAddr;

use replank_core::fault::Fault;
use reqwest::Url;

use super::outbound::{self, Kind, Reach, Refused};

/// Longest URL that any git host gives out, with room.
const MAX_URL: usize = 2_000;
/// Tokens are at most a few kilobytes (JSON web tokens); the header must fit servers' 8 KiB limit.
const MAX_SECRET: usize = 4_096;

/// A user name and its secret. Shown by nothing.
#[derive(Clone, PartialEq, Eq)]
pub struct Credential {
    pub username: String,
    pub password: String,
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credential(..)")
    }
}

impl Credential {
    fn check(&self) -> Result<(), Fault> {
        let fine = |text: &str| text.len() <= MAX_SECRET && !text.chars().any(char::is_control);
        if fine(&self.username) && fine(&self.password) && !self.username.contains(':') {
            return Ok(());
        }
        Err(Fault::permanent("the credential of the git remote cannot be used").advice(format!(
            "give a user name without ':' and a password, each of at most {MAX_SECRET} bytes without control characters"
        )))
    }
}

/// A remote that obeys the rule, without userinfo.
#[derive(Debug, Clone)]
pub struct Remote {
    url: Url,
    host: Host,
    credential: Option<Credential>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Host {
    Name(String),
    Literal(IpAddr),
}

const SHAPE: &str = "set the git remote to https://HOST/PATH.git";

impl Remote {
    /// Reads a remote from configuration; its userinfo becomes the credential. Faults are permanent and show no secret.
    pub fn parse(text: &str, credential: Option<Credential>, reach: Reach) -> Result<Self, Fault> {
        // The text may hold a password, so no fault repeats it.
        let bad = |why: &str| Fault::permanent(format!("the git remote is not usable: {why}")).advice(SHAPE);
        if text.len() > MAX_URL {
            return Err(bad("it is too long"));
        }
        // The URL parser drops tabs and line breaks and turns '\' into '/': two readers would see two URLs.
        if !text.bytes().all(|b| b.is_ascii_graphic() && b != b'\\') {
            return Err(bad("it has spaces, backslashes or characters outside ASCII"));
        }
        let mut url = Url::parse(text).map_err(|_| bad("it is not a URL"))?;
        match (url.scheme(), reach.loopback) {
            ("https", _) | ("http", true) => {}
            ("http", false) => return Err(bad("http is for development only")),
            _ => return Err(bad("its scheme is not https")),
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err(bad("it has a query or a fragment"));
        }
        let path = url.path();
        if !path.ends_with(".git") || path.ends_with("/.git") {
            return Err(bad("its path does not end in '.git' after a name"));
        }
        let credential = match (cut_userinfo(&mut url)?, credential) {
            (Some(_), Some(_)) => {
                return Err(bad("it carries a credential, and another one is configured")
                    .advice("give the credential in one place, best outside the URL"));
            }
            (found, configured) => found.or(configured),
        };
        if let Some(credential) = &credential {
            credential.check()?;
        }
        let text = url.host_str().ok_or_else(|| bad("it has no host"))?.to_owned();
        // `https` and `http` hosts come out of the parser with addresses in one spelling: 0x7f000001 is 127.0.0.1 here.
        let host = match text.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>() {
            Ok(ip) => Host::Literal(ip),
            Err(_) if text.ends_with('.') => return Err(bad("its host ends in a dot")),
            Err(_) => Host::Name(text),
        };
        let remote = Self { url, host, credential };
        match &remote.host {
            Host::Literal(ip) => remote.admit(outbound::admit(*ip, reach))?,
            Host::Name(name) => outbound::admit_name(name, reach).map_err(refused)?,
        }
        Ok(remote)
    }

    /// Judges one address that the remote's name has. Plain http ends at the company's door.
    pub(super) fn admit(&self, judged: Result<Kind, Refused>) -> Result<(), Fault> {
        match judged.map_err(refused)? {
            Kind::Public if self.is_plain() => {
                Err(Fault::permanent("the git remote is not usable: http over a public network shows everything")
                    .advice(SHAPE))
            }
            Kind::Public | Kind::Private | Kind::Loopback | Kind::Never(_) => Ok(()),
        }
    }

    pub(super) fn is_plain(&self) -> bool {
        self.url.scheme() == "http"
    }

    /// The remote as it may be shown: without userinfo.
    pub fn shown(&self) -> &str {
        self.url.as_str()
    }

    pub(super) fn host(&self) -> &Host {
        &self.host
    }

    /// The host as it stands in the URL: an IPv6 address keeps its brackets.
    pub(super) fn host_text(&self) -> &str {
        self.url.host_str().unwrap_or_default()
    }

    pub(super) fn port(&self) -> u16 {
        self.url.port_or_known_default().unwrap_or(443)
    }

    pub(super) fn credential(&self) -> Option<&Credential> {
        self.credential.as_ref()
    }
}

pub(super) fn refused(why: Refused) -> Fault {
    let advice = match &why {
        Refused::Loopback(_) => "allow loopback remotes only for development",
        Refused::Private(_) => "allow private remotes if the git server is on your own network",
        Refused::Never(..) => "name the git server itself",
        // Names come and go; the others stay what they are.
        Refused::Nowhere(_) => {
            return Fault::transient("the git remote's host has no address").because(why);
        }
    };
    Fault::permanent("the git remote's host is refused").advice(advice).because(why)
}

fn cut_userinfo(url: &mut Url) -> Result<Option<Credential>, Fault> {
    if url.username().is_empty() && url.password().is_none() {
        return Ok(None);
    }
    let username = decode(url.username())?;
    let password = decode(url.password().unwrap_or_default())?;
    let cut = url.set_username("").and_then(|()| url.set_password(None));
    if cut.is_err() || !url.username().is_empty() || url.password().is_some() {
        return Err(Fault::permanent("the userinfo of the git remote cannot be cut off").advice(SHAPE));
    }
    Ok(Some(Credential { username, password }))
}

/// Undoes percent-encoding; what is not valid UTF-8 afterwards is no credential.
fn decode(text: &str) -> Result<String, Fault> {
    let bad = || {
        Fault::permanent("the userinfo of the git remote is not valid").advice("percent-encode its special characters")
    };
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || rest.next().and_then(|b| char::from(b).to_digit(16)).ok_or_else(bad);
        let value = digit()? * 16 + digit()?;
        bytes.push(u8::try_from(value).map_err(|_| bad())?);
    }
    String::from_utf8(bytes).map_err(|_| bad())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, reach: Reach, expect: Option<&str>) {
        let got = Remote::parse(text, None, reach);
        assert_eq!(got.as_ref().ok().map(Remote::shown), expect, "{text} {:?}", got.as_ref().err().map(Fault::chain));
        if let Err(fault) = got {
            assert_eq!(fault.class, replank_core::fault::Class::Permanent, "{text}");
            assert!(!fault.advice.is_empty(), "{text}");
            assert!(!format!("{} {} {fault:?}", fault.chain(), fault.advice).contains("hunter2"), "{text}");
        }
    }

    #[test]
    fn remotes_obey_the_rule() {
        let closed = Reach::default();
        for good in
            ["https://github.com/o/r.git", "https://git.example.com:8443/a/b/c.git", "https://140.82.121.4/r.git"]
        {
            check(good, closed, Some(good));
        }
        check("https://user:hunter2@github.com/o/r.git", closed, Some("https://github.com/o/r.git"));
        check("HTTPS://GitHub.COM/o/r.git", closed, Some("https://github.com/o/r.git"));
        let long = format!("https://github.com/{}.git", "a".repeat(MAX_URL));
        for bad in [
            "",
            "github.com/o/r.git",
            "git@github.com:o/r.git",
            "ssh://git@github.com/o/r.git",
            "git://github.com/o/r.git",
            "file:///srv/r.git",
            "ext::sh -c x",
            "http://github.com/o/r.git",
            "https://github.com/o/r",
            "https://github.com/.git",
            "https://github.com/o/r.git?x=1",
            "https://github.com/o/r.git#x",
            "https://github.com/o r.git",
            "https://github.com\\@evil/r.git",
            "https://github.com/o/\tr.git",
            "https://github.com/o/r.git\n",
            "--upload-pack=x",
            "https://user:hunter2@/r.git",
            "https://u:hunter2@127.0.0.1/r.git",
            &long,
            "https://127.0.0.1/r.git",
            "https://127.1/r.git",
            "https://0x7f000001/r.git",
            "https://2130706433/r.git",
            "https://0177.0.0.1/r.git",
            "https://0/r.git",
            "https://[::1]/r.git",
            "https://[::ffff:127.0.0.1]/r.git",
            "https://[::ffff:7f00:1]/r.git",
            "https://localhost/r.git",
            "https://LocalHost/r.git",
            "https://localhost./r.git",
            "https://x.localhost/r.git",
            "https://169.254.169.254/r.git",
            "https://0xa9fea9fe/r.git",
            "https://[fd00:ec2::254]/r.git",
            "https://100.100.100.200/r.git",
            "https://168.63.129.16/r.git",
            "https://metadata.google.internal/r.git",
            "https://10.0.0.1/r.git",
            "https://[fd12::1]/r.git",
            "https://%31%32%37.0.0.1/r.git",
            "https://１２７.0.0.1/r.git",
        ] {
            check(bad, closed, None);
        }
    }

    #[test]
    fn settings_open_only_what_they_name() {
        let (loopback, private) = (Reach { loopback: true, private: false }, Reach { loopback: false, private: true });
        check("http://127.0.0.1:8080/r.git", loopback, Some("http://127.0.0.1:8080/r.git"));
        check("http://localhost:8080/r.git", loopback, Some("http://localhost:8080/r.git"));
        check("https://10.0.0.1/r.git", private, Some("https://10.0.0.1/r.git"));
        check("http://140.82.121.4/r.git", loopback, None);
        check("http://10.0.0.1/r.git", loopback, None);
        check("http://10.0.0.1/r.git", private, None);
        check("https://169.254.169.254/r.git", Reach { loopback: true, private: true }, None);
    }

    #[test]
    fn userinfo_becomes_the_credential() {
        for (text, username, password) in [
            ("https://u:p%40ss%3A@h.example/r.git", "u", "p@ss:"),
            ("https://token@h.example/r.git", "token", ""),
            ("https://x:@h.example/r.git", "x", ""),
        ] {
            let remote = Remote::parse(text, None, Reach::default()).expect(text);
            let expect = Credential { username: username.to_owned(), password: password.to_owned() };
            assert_eq!(remote.credential(), Some(&expect), "{text}");
            assert_eq!(remote.shown(), "https://h.example/r.git");
        }
        let other = Some(Credential { username: "a".to_owned(), password: "b".to_owned() });
        assert!(Remote::parse("https://u:p@h.example/r.git", other, Reach::default()).is_err());
        assert!(Remote::parse("https://u:p%0Aq@h.example/r.git", None, Reach::default()).is_err());
        assert!(Remote::parse("https://u:%ff@h.example/r.git", None, Reach::default()).is_err());
    }
}
