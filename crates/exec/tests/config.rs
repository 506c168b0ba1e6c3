//! The server's environment: defaults, bounds, and what keeps it from starting.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use replank_exec::server::config::{Config, Mode, Rate};

const TOKEN: (&str, &str) = ("EXEC_TOKEN", "0123456789abcdef");

fn read(variables: &[(&str, &str)]) -> Result<Config, String> {
    let get =
        |name: &str| variables.iter().rev().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned());
    Config::read(get).map_err(|unusable| unusable.to_string())
}

#[test]
fn defaults_are_the_contract_s() {
    let config = read(&[TOKEN]).unwrap();
    assert_eq!(config.listen.to_string(), "127.0.0.1:7682");
    assert_eq!((config.max_concurrency, config.max_body, config.max_output), (4, 8 << 20, 8 << 20));
    assert_eq!(config.max_clone, 4 << 30);
    assert_eq!((config.max_line, config.rate, config.mode), (64 << 10, None, Mode::Enforce));
    assert_eq!(config.rules.clone_root.to_str(), Some("/tmp/elb-upgrade"));
    assert_eq!(config.rules.programs.len(), 6);
    assert!(config.rules.remote.is_none() && config.rules.registry.is_none());
    let strict = read(&[TOKEN, ("STRICT_EXEC_RATE_LIMIT", "true")]).unwrap();
    assert_eq!(strict.rate, Some(Rate { starts: 120, window: Duration::from_secs(60) }));
    assert!(!format!("{config:?}").contains("0123456789"), "the token shows");
}

#[test]
fn what_is_set_counts_and_what_is_empty_does_not() {
    let config = read(&[
        TOKEN,
        ("EXEC_HOST", "::1"),
        ("EXEC_PORT", "9000"),
        ("EXEC_ALLOWED_BINARIES", "git, az"),
        ("EXEC_CLONE_ROOT", "/srv/clones"),
        ("EXEC_POLICY", "audit"),
        ("EXEC_MAX_CONCURRENCY", "8"),
        ("UPGRADE_GIT_REMOTE", " https://git.example.com/a.git "),
        ("PLATFORM_ACR_NAME", ""),
    ])
    .unwrap();
    assert_eq!(config.listen.to_string(), "[::1]:9000");
    assert_eq!(config.rules.programs.iter().collect::<Vec<_>>(), ["az", "git"]);
    assert_eq!((config.mode, config.max_concurrency), (Mode::Audit, 8));
    assert_eq!(config.rules.remote.as_deref(), Some("https://git.example.com/a.git"));
    assert_eq!(config.rules.registry, None);
}

#[test]
fn what_cannot_be_used_keeps_it_from_starting() {
    #[track_caller]
    fn check(variables: &[(&str, &str)], expect: &str) {
        let mut all = vec![TOKEN];
        all.extend(variables);
        assert_eq!(read(&all).unwrap_err(), expect);
    }
    assert_eq!(read(&[]).unwrap_err(), "EXEC_TOKEN is not set: give the server a token of 16 to 1024 characters");
    check(&[("EXEC_TOKEN", "")], "EXEC_TOKEN is not set: give the server a token of 16 to 1024 characters");
    check(&[("EXEC_TOKEN", "0123456789abcde")], "EXEC_TOKEN must have 16 to 1024 characters");
    check(&[("EXEC_TOKEN", &"x".repeat(1025))], "EXEC_TOKEN must have 16 to 1024 characters");
    check(&[("EXEC_HOST", "example.org")], "EXEC_HOST is not an IP address");
    let app = ("CONTAINER_APP_NAME", "app");
    let loopback = "EXEC_HOST must be a loopback address where CONTAINER_APP_NAME is set";
    check(&[app, ("EXEC_HOST", "0.0.0.0")], loopback);
    check(&[app, ("EXEC_HOST", "10.0.0.4")], loopback);
    check(&[app, ("EXEC_HOST", "::")], loopback);
    assert!(read(&[TOKEN, app, ("EXEC_HOST", "127.0.0.2")]).is_ok());
    assert!(read(&[TOKEN, ("EXEC_HOST", "0.0.0.0")]).is_ok(), "elsewhere it is the operator's choice");
    check(&[("EXEC_PORT", "70000")], "EXEC_PORT must be a number from 0 to 65535");
    check(&[("EXEC_MAX_CONCURRENCY", "0")], "EXEC_MAX_CONCURRENCY must be a number from 1 to 256");
    check(&[("EXEC_POLICY", "off")], "EXEC_POLICY must be enforce or audit");
    check(&[("STRICT_EXEC_RATE_LIMIT", "yes")], "STRICT_EXEC_RATE_LIMIT must be true or false");
    let programs = "EXEC_ALLOWED_BINARIES must name some of az azcopy elastic-blast elb git kubectl";
    check(&[("EXEC_ALLOWED_BINARIES", "git,sh")], programs);
    check(&[("EXEC_ALLOWED_BINARIES", ",")], programs);
    check(&[("EXEC_ALLOWED_SIGNERS_FILE", "signers")], "EXEC_ALLOWED_SIGNERS_FILE must be an absolute path");
    check(&[("EXEC_REVOKED_SIGNERS_FILE", "./revoked")], "EXEC_REVOKED_SIGNERS_FILE must be an absolute path");
    check(&[("EXEC_OPENPGP_KEYRING_FILE", "keys.gpg")], "EXEC_OPENPGP_KEYRING_FILE must be an absolute path");
    let root = "EXEC_CLONE_ROOT must be an absolute path below /, without '..'";
    for path in ["clones", "/", "/tmp/..", "/tmp/../etc"] {
        check(&[("EXEC_CLONE_ROOT", path)], root);
    }
}

/// The URL rule, and the two settings that open it: what can be known without asking anybody is known at the start.
#[test]
fn a_remote_that_may_not_be_one_keeps_it_from_starting() {
    const CLOSED: &[(&str, &str)] = &[];
    const PRIVATE: &[(&str, &str)] = &[("EXEC_ALLOW_PRIVATE_REMOTE", "true")];
    const LOOPBACK: &[(&str, &str)] = &[("EXEC_ALLOW_LOOPBACK_REMOTE", "true")];
    #[track_caller]
    fn check(settings: &[(&str, &str)], remote: &str, expect: Result<(), &str>) {
        let mut all = vec![TOKEN, ("UPGRADE_GIT_REMOTE", remote)];
        all.extend(settings);
        let found = read(&all).map(|_| ());
        match (&found, expect) {
            (Ok(()), Ok(())) => {}
            (Err(found), Err(part)) if found.starts_with("UPGRADE_GIT_REMOTE ") && found.contains(part) => {}
            _ => panic!("{remote} with {settings:?}: {found:?}"),
        }
        assert!(!format!("{found:?}").contains("hunter2"), "the password shows: {found:?}");
    }
    for remote in [
        "https://git.example.com/acme/app.git",
        "https://user:hunter2@git.example.com:8443/acme/app.git",
        "https://140.82.121.4/app.git",
        "https://[2606:50c0:8000::154]/app.git",
        "https://[2606:50c0:8000::154]:8443/app.git",
        "https://1.example.com/app.git",
    ] {
        check(CLOSED, remote, Ok(()));
    }
    for (remote, why) in [
        ("http://user:hunter2@git.example.com/app.git", "EXEC_ALLOW_LOOPBACK_REMOTE=true"),
        ("ssh://git.example.com/app.git", "must be https://HOST/PATH.git"),
        ("git@git.example.com:app.git", "must be https://HOST/PATH.git"),
        ("file:///srv/app.git", "must be https://HOST/PATH.git"),
        ("ext::sh -c id", "must be https://HOST/PATH.git"),
        ("https://git.example.com", "must be https://HOST/PATH.git"),
        ("https://git.example.com:x/app.git", "must be https://HOST/PATH.git"),
        ("https://git.example.com:99999/app.git", "must be https://HOST/PATH.git"),
        ("https://git.example.com/app", "must end in .git"),
        ("https://git.example.com/.git", "must end in .git"),
        ("https://git.example.com/app.git?x=.git", "must end in .git"),
        ("https://git.example.com/app.git#.git", "must end in .git"),
        ("https://git.example.com./app.git", "must name its host by a name"),
        ("https://-x.example.com/app.git", "must name its host by a name"),
        ("https://127.1/app.git", "must name its host by a name"),
        ("https://0x7f000001/app.git", "must name its host by a name"),
        ("https://2130706433/app.git", "must name its host by a name"),
        ("https://0177.0.0.1/app.git", "must name its host by a name"),
        ("https://%31%32%37.0.0.1/app.git", "must name its host by a name"),
        ("https://::1/app.git", "must"),
        ("https://[127.0.0.1]/app.git", "must name its host by a name"),
        ("https://[fe80::1%25eth0]/app.git", "must name its host by a name"),
        ("https://127.0.0.1/app.git", "this machine itself"),
        ("https://u:hunter2@[::ffff:127.0.0.1]/app.git", "this machine itself"),
        ("https://localhost/app.git", "this machine itself"),
        ("https://x.LocalHost/app.git", "this machine itself"),
        ("https://10.0.0.1/app.git", "EXEC_ALLOW_PRIVATE_REMOTE=true"),
        ("https://[fd12::1]/app.git", "a private address"),
        ("https://0.0.0.0/app.git", "an unspecified address"),
    ] {
        check(CLOSED, remote, Err(why));
    }
    for remote in [
        "https://169.254.169.254/app.git",
        "https://[fd00:ec2::254]/app.git",
        "https://168.63.129.16/app.git",
        "https://metadata.google.internal/app.git",
    ] {
        for settings in [CLOSED, PRIVATE, LOOPBACK] {
            check(settings, remote, Err("metadata service"));
        }
    }
    check(PRIVATE, "https://10.0.0.1/app.git", Ok(()));
    check(PRIVATE, "http://10.0.0.1/app.git", Err("must begin with https://"));
    check(PRIVATE, "https://127.0.0.1/app.git", Err("this machine itself"));
    for remote in
        ["http://127.0.0.1:3000/a.git", "http://localhost/a.git", "http://10.0.0.1/a.git", "https://[::1]/a.git"]
    {
        check(LOOPBACK, remote, Ok(()));
    }
    check(LOOPBACK, "http://140.82.121.4/app.git", Err("http shows everything"));
    check(&[("EXEC_ALLOW_LOOPBACK_REMOTE", "false")], "http://127.0.0.1/a.git", Err("must begin with https://"));
    // A deployed server may have it, too: simulators need it. That it has is told at its start.
    check(&[LOOPBACK[0], ("CONTAINER_APP_NAME", "app")], "http://127.0.0.1/a.git", Ok(()));
    let wrong = read(&[TOKEN, ("EXEC_ALLOW_PRIVATE_REMOTE", "yes")]).unwrap_err();
    assert_eq!(wrong, "EXEC_ALLOW_PRIVATE_REMOTE must be true or false");
}
