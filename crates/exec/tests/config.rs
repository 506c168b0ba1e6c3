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
    let root = "EXEC_CLONE_ROOT must be an absolute path below /, without '..'";
    for path in ["clones", "/", "/tmp/..", "/tmp/../etc"] {
        check(&[("EXEC_CLONE_ROOT", path)], root);
    }
}
