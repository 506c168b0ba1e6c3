//! Configuration and manifest: what is wrong is told in full, each at its place, with what to do.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::path::Path;

use replank::config::Settings;
use replank::config::env::Environment;
use replank::config::manifest::{Manifest, recipes};
use replank_core::phase::Mode;
use replank_core::words::ComponentName;

const GOOD: &str = r#"
application = "shop"
networks = ["backbone"]

[source]
remote = "https://git.test/shop.git"
credential = { username = "bot", password_file = "git.secret" }

[server]
listen = "127.0.0.1:9000"
public_hosts = ["Upgrade.example.org"]

[build]
parallel = 2
memory = "2GiB"
cpus = 1.5
secrets.NPM = { file = "npm.secret" }

[registry]
host = "127.0.0.1:5000"
insecure = true

[components.api]
dockerfile = "api/Dockerfile"
args = { FLAVOUR = "operator" }
secrets = ["NPM"]

[components.web]

[containers.api]
component = "api"
mounts = [{ source = "./data", target = "/data" }]
probe = { port = 80, path = "/health", version = { json_pointer = "/version" } }
networks = ["backbone"]

[containers.replank]
component = "web"
controller = true
depends_on = ["api"]

[listeners.web]
publish = 8080
container = "api"
port = 80

[policy]
mode = "blue-green"
confirm_window_seconds = 5
on_rollout_failure = "rollback"
budgets = { validating_seconds = 60 }
"#;

fn parse(text: &str, env: &[(&str, &str)]) -> Result<Settings, String> {
    Settings::parse("replank.toml", Path::new("/srv/shop/replank.toml"), text, &Environment::of(env))
        .map_err(|p| p.to_string())
}

#[test]
fn a_good_file_becomes_settings() {
    let settings = parse(GOOD, &[]).unwrap();
    assert_eq!(settings.home, Path::new("/srv/shop"));
    assert_eq!(settings.ledger_dir(), Path::new("/srv/shop/ledger"));
    assert_eq!(settings.server.listen.port(), 9000);
    assert_eq!(settings.hosts().into_iter().collect::<Vec<_>>(), ["replank", "upgrade.example.org"]);
    assert_eq!(settings.build.memory_bytes, Some(2 << 30));
    assert_eq!(settings.build.cpu_millis, Some(1500));
    assert_eq!(settings.mode, Mode::BlueGreen);
    assert_eq!(settings.policy.budgets.confirm_window, 5_000);
    let api = &settings.components[&ComponentName::new("api").unwrap()];
    assert_eq!(api.repository, "127.0.0.1:5000/shop-api");
    let containers = &settings.platform.containers;
    assert_eq!(containers.values().next().unwrap().mounts[0].source, "/srv/shop/data");
}

#[test]
fn the_environment_wins() {
    let env = [
        ("STRICT_BLUEGREEN", "false"),
        ("UPGRADE_GIT_REMOTE", "https://other.test/shop.git"),
        ("UPGRADE_CONFIRM_WINDOW_SECONDS", "30"),
        ("UPGRADE_VALIDATING_TIMEOUT_SECONDS", "90"),
        ("UPGRADE_ADMIN_OIDS", "a, B,,"),
        ("APP_VERSION", "1.2.3"),
        ("CONTAINER_APP_NAME", ""),
    ];
    let settings = parse(GOOD, &env).unwrap();
    assert_eq!(settings.source.unwrap().remote, "https://other.test/shop.git");
    assert_eq!(settings.policy.budgets.confirm_window, 30_000);
    assert_eq!(settings.policy.budgets.validating, 90_000);
    assert_eq!(settings.admin_oids.into_iter().collect::<Vec<_>>(), ["B", "a"]);
    assert_eq!(settings.app_version.as_deref(), Some("1.2.3"));
    assert_eq!(settings.container_app, None, "an empty variable is no variable");
    assert_eq!(
        parse("application = \"a\"\n[components.a]\n", &[("STRICT_BLUEGREEN", "true")]).unwrap().mode,
        Mode::BlueGreen
    );
    for (name, value, expect) in [
        (
            "UPGRADE_VALIDATING_TIMEOUT_SECONDS",
            "59",
            "environment: UPGRADE_VALIDATING_TIMEOUT_SECONDS: \"59\" is not usable; give 60 to 604800 seconds",
        ),
        (
            "UPGRADE_CONFIRM_WINDOW_SECONDS",
            "x",
            "environment: UPGRADE_CONFIRM_WINDOW_SECONDS: \"x\" is not usable; give 1 to 604800 seconds",
        ),
        (
            "STRICT_BLUEGREEN",
            "maybe",
            "environment: STRICT_BLUEGREEN: \"maybe\" is not usable; set it to true or false",
        ),
    ] {
        assert_eq!(parse(GOOD, &[(name, value)]).unwrap_err(), expect);
    }
}

/// Replaces one part of the good file and expects exactly these problems.
#[test]
fn each_mistake_is_one_clear_problem() {
    let mut wrong = Vec::new();
    for (from, to, expect) in [
        (
            "application = \"shop\"",
            "",
            "replank.toml: application: `application` is missing; add `application = \"NAME\"` at the top of the file",
        ),
        (
            "\"shop\"",
            "\"Shop\"",
            "replank.toml:2:15: application: application name \"Shop\" is not valid: 1 to 32 of a-z, 0-9 and '-', beginning with a letter",
        ),
        (
            "parallel = 2",
            "paralel = 2",
            "replank.toml:14:1: build.paralel: this key is not known; did you mean `parallel`?",
        ),
        ("parallel = 2", "parallel = \"2\"", "replank.toml:14:12: build.parallel: expected u32, found string \"2\""),
        (
            "parallel = 2",
            "parallel = 0",
            "replank.toml:14:1: build.parallel: 0 builds at once are not possible; choose 1 to 32",
        ),
        (
            "\"2GiB\"",
            "\"2 apples\"",
            "replank.toml:15:10: build.memory: \"2 apples\" is not a size such as \"512MiB\" or \"2GiB\"",
        ),
        (
            "component = \"web\"",
            "component = \"wep\"",
            "replank.toml:37:1: containers.replank.component: there is no component \"wep\"; did you mean \"web\"?",
        ),
        (
            "depends_on = [\"api\"]",
            "depends_on = [\"apy\"]",
            "replank.toml:39:1: containers.replank.depends_on: there is no container \"apy\"; did you mean \"api\"?",
        ),
        (
            "container = \"api\"",
            "container = \"nothing\"",
            "replank.toml:43:1: listeners.web.container: there is no container \"nothing\"; name one of the configured containers",
        ),
        (
            "secrets = [\"NPM\"]",
            "secrets = [\"NMP\"]",
            "replank.toml:26:1: components.api.secrets: build secret \"NMP\" is not configured; add `secrets.NMP = { file = \"…\" }` to [build]",
        ),
        (
            "\"api/Dockerfile\"",
            "\"../Dockerfile\"",
            "replank.toml:24:1: components.api.dockerfile: \"../Dockerfile\" leaves the tree with \"..\"; give a path inside the release's tree",
        ),
        (
            "networks = [\"backbone\"]\n\n[source]",
            "[source]",
            "replank.toml:32:1: containers.api.networks: network \"backbone\" is not declared; add it to `networks = [\"backbone\"]` at the top",
        ),
        (
            "https://git.test/shop.git",
            "https://u:hunter2@git.test/shop.git",
            "replank.toml:6:1: source.remote: the remote carries a credential; take it out and use `[source.credential]` with password_file or password_env",
        ),
        (
            "https://git.test/shop.git",
            "git@git.test:shop.git",
            "replank.toml:6:1: source.remote: the remote is not an https URL; set it to https://HOST/PATH.git",
        ),
        (
            "password_file = \"git.secret\"",
            "password_env = \"A\", password_file = \"b\"",
            "replank.toml:7:1: source.credential: the password has no single source; give exactly one of password_file and password_env",
        ),
        (
            "\"127.0.0.1:9000\"",
            "\"9000\"",
            "replank.toml:10:1: server.listen: expected an address and a port; write it as \"127.0.0.1:8086\"",
        ),
        (
            "validating_seconds = 60",
            "validating_seconds = 59",
            "replank.toml:50:13: policy.budgets.validating_seconds: 59 s is out of range; choose 60 to 604800",
        ),
        (
            "\"blue-green\"",
            "\"green\"",
            "replank.toml:47:8: policy.mode: \"green\" is not one of `single` or `blue-green`",
        ),
        (
            "publish = 8080",
            "publish = 80800",
            "replank.toml:42:11: listeners.web.publish: expected u16, found integer `80800`",
        ),
        (
            "port = 80, path",
            "prot = 80, path",
            "replank.toml:33:11: containers.api.probe.prot: this key is not known; did you mean `port`?",
        ),
        ("[policy]", "[policy", "replank.toml:46:8: this is not valid TOML"),
    ] {
        assert!(GOOD.contains(from), "{from}");
        let got = parse(&GOOD.replacen(from, to, 1), &[]).expect_err(to);
        let mut got: Vec<&str> = got.lines().collect();
        let mut expect: Vec<&str> = expect.lines().collect();
        got.sort_unstable();
        expect.sort_unstable();
        let fine = if to == "[policy" { got[0].starts_with(expect[0]) } else { got == expect };
        if !fine {
            wrong.push(format!("for {to:?}\n  expected {expect:#?}\n  got {got:#?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn all_problems_are_told_at_once() {
    let text = GOOD
        .replace("parallel", "paralel")
        .replace("publish = 8080", "publish = true")
        .replace("\"web\"\ncontroller", "\"wep\"\ncontroler");
    let told = parse(&text, &[]).unwrap_err();
    for part in [
        "build.paralel",
        "listeners.web.publish",
        "containers.replank.component",
        "containers.replank.controler: this key is not known; did you mean `controller`?",
    ] {
        assert!(told.contains(part), "{part} is not in:\n{told}");
    }
    assert!(!told.contains("hunter2"));
    let twice = format!("{GOOD}\n[listeners.two]\npublish = 8080\ncontainer = \"api\"\nport = 81\n");
    assert!(
        parse(&twice, &[])
            .unwrap_err()
            .contains("listeners.web.publish: port 8080 is already published by listener two")
    );
}

#[test]
fn deep_and_huge_files_are_refused() {
    let deep = format!("a = {}{}", "[".repeat(60), "]".repeat(60));
    assert!(parse(&deep, &[]).is_err());
    assert!(parse(&"#".repeat(2 << 20), &[]).unwrap_err().contains("bytes"));
}

#[test]
fn a_release_may_set_its_own_things_only() {
    let own = r#"
        schema = "one-way"
        notes = "hello"
        upgrade_from = "0.1.0"
        [components.api]
        dockerfile = "Dockerfile.new"
        target = "final"
        args = { FLAVOUR = "release", SPEED = "9" }
        [probes.api]
        path = "/healthz"
        [requires]
        environment = ["DATABASE_URL"]
    "#;
    let manifest = Manifest::parse(own).unwrap();
    let settings = parse(GOOD, &[]).unwrap();
    let made = recipes(&settings, &manifest, &"0.2.0".parse().unwrap()).unwrap();
    let api = &made[&ComponentName::new("api").unwrap()];
    assert_eq!((api.dockerfile.as_str(), api.target.as_deref()), ("Dockerfile.new", Some("final")));
    assert_eq!(api.args["FLAVOUR"], "operator", "the operator's word stands");
    assert_eq!((api.args["SPEED"].as_str(), api.args["APP_VERSION"].as_str()), ("9", "0.2.0"));
    assert_eq!(api.secrets, ["NPM"]);
    assert_eq!(manifest.to_json()["probes"]["api"]["path"], "/healthz");
    assert_eq!(Manifest::parse("").unwrap().to_json(), serde_json::json!({}));
    let running = "0.0.9".parse().unwrap();
    assert_eq!(manifest.missing(&settings, Some(&running)).len(), 2);
    let unknown = Manifest::parse("[components.other]\n").unwrap();
    assert!(recipes(&settings, &unknown, &"0.2.0".parse().unwrap()).is_err());

    for (text, expect) in [
        ("mounts = []", ".replank.toml:1:1: mounts: this key is not known; a release may not set it"),
        (
            "[components.api]\nsecrets = [\"NPM\"]",
            "components.api.secrets: this key is not known; a release may not set it",
        ),
        (
            "[components.api]\nnetwork = \"host\"",
            "components.api.network: this key is not known; a release may not set it",
        ),
        ("[components.api]\nrepository = \"evil\"", "components.api.repository: this key is not known"),
        ("[registry]\nhost = \"evil.test\"", "registry: this key is not known"),
        ("[source]\nremote = \"x\"", "source: this key is not known"),
        ("[policy]\nmode = \"single\"", "policy: this key is not known"),
        ("[probes.api]\nport = 22", "probes.api.port: this key is not known"),
        ("[probes.api]\ntimeout_ms = 1", "probes.api.timeout_ms: this is out of range"),
        ("[components.api]\ndockerfile = \"/etc/passwd\"", "is absolute"),
        ("[components.api]\ncontext = \"a/../../b\"", "leaves the tree"),
        ("[components.api]\nargs = { HTTP_PROXY = \"x\" }", "this steers the builder itself"),
        ("[components.api]\nargs = { APP_VERSION = \"x\" }", "APP_VERSION is set by Replank"),
        ("[components.api]\nargs = { \"A B\" = \"x\" }", "is not a name"),
        ("[migrate]\napi = []", "this is no command"),
        ("schema = \"maybe\"", "is not one of `compatible`, `one-way` or `unknown`"),
    ] {
        let told = Manifest::parse(text).expect_err(text).to_string();
        assert!(told.contains(expect), "{text}: {told}");
    }
}

/// The reference names every key that the reader knows, and no other: each section is asked about a key that nobody has.
/// Found by the fuzz target `manifest`: a release's author chose what the operator's terminal did.
#[test]
fn what_a_release_writes_reaches_no_terminal_as_it_is() {
    for text in [
        "\"\\u001b]0;x\\u0007\" = 1",
        "components.\"\\u202e\".x = 1",
        "schema = \"\\u0007\"",
        "\u{7}",
        "a = \"\u{202e}\u{7}\"",
    ] {
        let told = Manifest::parse(text).unwrap_err().in_one_line();
        assert!(!told.contains(|c: char| c.is_control() || c == '\u{202e}'), "{text:?}: {told:?}");
    }
}

#[test]
fn signed_releases_are_configured() {
    const REMOTE: &str = "remote = \"https://git.test/shop.git\"";
    #[track_caller]
    fn check(keys: &str, env: &[(&str, &str)], expect: Result<&str, &str>) {
        let text = GOOD.replace(REMOTE, &format!("{REMOTE}\n{keys}"));
        match (parse(&text, env), expect) {
            (Ok(settings), Ok(expect)) => {
                assert_eq!(format!("{:?}", settings.source.unwrap().verify), expect, "{keys}")
            }
            (Err(told), Err(expect)) => assert!(told.contains(expect) && told.lines().count() == 1, "{keys}: {told}"),
            (got, expect) => panic!("{keys}: {expect:?} instead of {:?}", got.map(|s| s.source)),
        }
    }
    let signed = "verify = \"signed-tags\"";
    let with = |more: &str| format!("{signed}\n{more}");
    let both =
        "SignedTags(Signers { allowed: Some(\"/srv/shop/signers\"), revoked: None, openpgp: Some(\"/etc/keys.gpg\") })";
    check("", &[], Ok("Nothing"));
    check("verify = \"none\"", &[], Ok("Nothing"));
    check(&with("allowed_signers_file = \"signers\"\nopenpgp_keyring_file = \"/etc/keys.gpg\""), &[], Ok(both));
    check("verify = \"signed\"", &[], Err("source.verify"));
    check(signed, &[], Err("there is no key that a tag could be signed with; add `allowed_signers_file"));
    check(
        &with("openpgp_keyring_file = \"a\"\nrevoked_signers_file = \"b\""),
        &[],
        Err("no SSH keys that it could revoke"),
    );
    check("allowed_signers_file = \"signers\"", &[], Err("no signature is asked for; set `verify"));
    // The environment wins, and says so where it is wrong.
    let keys = "allowed_signers_file = \"signers\"";
    check(keys, &[("UPGRADE_GIT_VERIFY", "signed-tags")], Ok(&both.replace("Some(\"/etc/keys.gpg\")", "None")));
    check(&with(keys), &[("UPGRADE_GIT_VERIFY", "none")], Err("no signature is asked for"));
    // Through the exec channel the keys are the other end's.
    let remote = ("UPGRADE_GIT_REMOTE", "https://git.test/shop.git");
    let settings = parse(AZ_EXEC, &[remote, ("UPGRADE_GIT_VERIFY", "signed-tags")]).unwrap();
    assert_eq!(format!("{:?}", settings.source.unwrap().verify), "SignedElsewhere");
    let told = parse(&format!("{AZ_EXEC}\n[source]\n{REMOTE}\n{}", with(keys)), &[]).unwrap_err();
    assert!(told.contains("the exec server's git checks signatures; give the keys to the exec server"), "{told}");
    check(
        "",
        &[("UPGRADE_GIT_VERIFY", "yes")],
        Err("UPGRADE_GIT_VERIFY: \"yes\" is not usable; set it to none or signed-tags"),
    );
}

#[test]
fn the_reference_names_every_key() {
    let reference = include_str!("../../../docs/configuration.md");
    let (operator, release) = reference.split_once("\n## `.replank.toml`").unwrap();
    let mut seen = 0;
    for section in operator.split("\n## ").flat_map(|part| part.split("\n### ")) {
        let title = section.lines().next().unwrap();
        let table = match title.strip_prefix('`') {
            Some(header) => header.trim_end_matches('`').replace("NAME", "api"),
            None if title == "The file as a whole" => String::new(),
            None => continue,
        };
        let text = format!("{table}\nzzzzzzzzzzzzzzzz = 1\n");
        let told = parse(&text, &[]).unwrap_err();
        let known = told.lines().find_map(|line| line.split_once("known here: ")).unwrap_or_else(|| panic!("{told}")).1;
        let known: BTreeSet<&str> = known.split(", ").collect();
        assert_eq!(named(section), known, "{title}");
        seen += known.len();
    }
    assert!(seen > 80, "only {seen} keys were found: the sections' form has changed");

    let told = serde_json::from_str::<Manifest>(r#"{"zzzzzzzzzzzzzzzz":1}"#).unwrap_err().to_string();
    // The first quoted word is the stray key, the others are the known ones.
    let known: BTreeSet<&str> = told.split('`').skip(1).step_by(2).skip(1).collect();
    assert_eq!(named(release), known, "{told}");
}

/// The first column of a section's table.
fn named(section: &str) -> BTreeSet<&str> {
    section.lines().filter_map(|line| line.strip_prefix("| `")?.split_once('`')).map(|(key, _)| key).collect()
}

#[test]
fn whom_to_tell_is_checked_by_its_spelling() {
    let with = |text: &str| parse(&format!("application = \"a\"\n[components.a]\n{text}"), &[]);
    let hook = |url: &str, more: &str| with(&format!("[[webhooks]]\nurl = \"{url}\"\n{more}\n"));
    let settings =
        hook("https://hooks.example.org/x?token=y", "secret_env = \"S\"\nevents = [\"held\", \"succeeded\"]").unwrap();
    assert_eq!((settings.webhooks.len(), settings.webhooks[0].events.len()), (1, 2));
    assert_eq!(hook("https://hooks.example.org/", "secret_file = \"s\"").unwrap().webhooks[0].events.len(), 9, "all");
    hook("http://127.0.0.1:9/", "secret_env = \"S\"\nallow_loopback = true").unwrap();
    for (url, more, expect) in [
        ("http://hooks.example.org/", "secret_env = \"S\"", "number 1: its URL is not https"),
        ("https://127.0.0.1/", "secret_env = \"S\"", "loopback"),
        ("https://10.0.0.1/", "secret_env = \"S\"", "private"),
        ("https://metadata.google.internal/", "secret_env = \"S\"\nallow_private = true", "metadata"),
        ("https://u:hunter2@hooks.example.org/", "secret_env = \"S\"", "has a user"),
        ("hooks.example.org", "secret_env = \"S\"", "cannot be read"),
        ("https://hooks.example.org/", "", "one of secret_file and secret_env"),
        ("https://hooks.example.org/", "secret_env = \"S\"\nsecret_file = \"s\"", "one of secret_file and secret_env"),
        ("https://hooks.example.org/", "secret_env = \"S\"\nevents = []", "told nothing"),
        ("https://hooks.example.org/", "secret_env = \"S\"\nevents = [\"won\"]", "rollback_failed"),
    ] {
        let told = hook(url, more).expect_err(url);
        assert!(told.contains(expect) && !told.contains("hunter2"), "{url} {more}: {told}");
    }
    let twice = "[[webhooks]]\nurl = \"https://a.test/\"\nsecret_env = \"S\"\n".repeat(2);
    assert!(with(&twice).unwrap_err().contains("number 2: another one has the same URL"));

    let telemetry = |text: &str| with(&format!("[telemetry]\n{text}\n"));
    let quiet = with("").unwrap().telemetry;
    assert_eq!((quiet.metrics_are_public, quiet.otlp_endpoint), (false, None));
    assert!(telemetry("metrics = \"public\"").unwrap().telemetry.metrics_are_public);
    for (url, expect) in [
        ("http://127.0.0.1:4318", "http://127.0.0.1:4318/v1/traces"),
        ("https://otel.example.org/base/", "https://otel.example.org/base/v1/traces"),
        ("https://otel.example.org/v1/traces", "https://otel.example.org/v1/traces"),
    ] {
        let settings = telemetry(&format!("otlp_endpoint = \"{url}\"")).unwrap();
        assert_eq!(settings.telemetry.otlp_endpoint.as_deref(), Some(expect));
    }
    for bad in ["127.0.0.1:4318", "grpc://x:4317", "https://u:p@x/", "https://x/?key=1"] {
        assert!(telemetry(&format!("otlp_endpoint = \"{bad}\"")).unwrap_err().contains("collector's URL"), "{bad}");
    }
}

const AZ_EXEC: &str = r#"
application = "plane"
[build]
builder = "az-exec"
[registry]
acr = "PlaneACR"
[exec]
url = "http://terminal:7000"
token_file = "exec.token"
wait_out_seconds = 0
[components.api]
"#;

#[test]
fn builds_through_the_exec_channel_are_configured() {
    let settings = parse(AZ_EXEC, &[]).unwrap();
    let exec = settings.exec.as_ref().unwrap();
    assert_eq!(
        (exec.url.as_str(), exec.wait_out.as_secs(), exec.credential_in_url),
        ("http://terminal:7000", 0, false)
    );
    assert_eq!(exec.clone_root, Path::new("/tmp/elb-upgrade"));
    assert_eq!(format!("{:?}", exec.token), "File(\"/srv/shop/exec.token\")");
    assert_eq!((settings.build.parallel, settings.platform.runs), (1, false), "one after the other, and nothing runs");
    let registry = settings.registry.as_ref().unwrap();
    assert_eq!((registry.host.as_str(), registry.acr.as_deref()), ("planeacr.azurecr.io", Some("PlaneACR")));
    assert_eq!(settings.components[&ComponentName::new("api").unwrap()].repository, "planeacr.azurecr.io/plane-api");

    // The environment wins, as everywhere.
    let env = [
        ("TERMINAL_EXEC_UPSTREAM", "127.0.0.1:9"),
        ("EXEC_TOKEN", "0123456789abcdef"),
        ("EXEC_CLONE_ROOT", "/clones"),
        ("EXEC_CREDENTIAL_IN_URL", "true"),
        ("AZURE_CLIENT_ID", "me"),
        ("PLATFORM_ACR_NAME", "otheracr"),
        ("PLATFORM_ACR_LOGIN_SERVER", "otheracr.azurecr.cn"),
    ];
    let settings = parse(AZ_EXEC, &env).unwrap();
    let exec = settings.exec.as_ref().unwrap();
    assert_eq!((exec.url.as_str(), exec.clone_root.to_str()), ("127.0.0.1:9", Some("/clones")));
    assert_eq!((exec.client_id.as_deref(), exec.credential_in_url), (Some("me"), true));
    assert_eq!(format!("{:?}", exec.token), "Env(\"EXEC_TOKEN\")");
    assert_eq!(settings.registry.as_ref().unwrap().host, "otheracr.azurecr.cn");
    // Nobody else looks at these.
    let settings = parse(GOOD, &env).unwrap();
    assert_eq!(settings.registry.as_ref().unwrap().host, "127.0.0.1:5000");
    assert!(settings.exec.is_none() && settings.platform.runs && settings.build.parallel == 2);
}

#[test]
fn what_does_not_go_with_the_exec_channel_is_told() {
    #[track_caller]
    fn check(from: &str, to: &str, env: &[(&str, &str)], expect: &str) {
        assert!(AZ_EXEC.contains(from), "{from}");
        let told = parse(&AZ_EXEC.replace(from, to), env).unwrap_err();
        assert!(told.contains(expect), "{told}");
    }
    check("acr = \"PlaneACR\"", "", &[], "PLATFORM_ACR_NAME: is not set, and [registry] has no `acr`");
    check("PlaneACR", "plane.azurecr.io", &[], "registry.acr: \"plane.azurecr.io\" is not a container registry's name");
    check("http://terminal:7000", "https://terminal", &[], "exec.url: this is not an exec server's address");
    check("url", "token_env = \"X\"\nurl", &[], "exec: the token has two sources");
    check("token_file = \"exec.token\"", "", &[], "EXEC_TOKEN: is not set");
    check("url", "clone_root = \"clones\"\nurl", &[], "exec.clone_root: this is not an absolute path");
    let secret = "[components.api]\nsecrets = [\"NPM\"]\n[build.secrets]\nNPM = { env = \"N\" }";
    check("[components.api]", secret, &[], "components.api.secrets: builder \"az-exec\" gives no build secrets");
    check("[components.api]", "[components.api]\ncommit_arg = \"A B\"", &[], "build argument \"A B\" is not a name");
    check("builder = \"az-exec\"", "builder = \"docker\"", &[], "exec: nothing uses the exec channel");
    let runs = "[components.api]\n[containers.api]\ncomponent = \"api\"";
    check("[components.api]", runs, &[], "build.builder: the Docker platform runs only what builder \"docker\" builds");
    check(
        "[build]",
        "platform = \"none\"\n[build]",
        &[("TERMINAL_EXEC_UPSTREAM", "x")],
        "TERMINAL_EXEC_UPSTREAM: this is not",
    );
    let told = parse(&format!("platform = \"none\"\n{GOOD}"), &[]).unwrap_err();
    assert!(told.contains("platform: nothing runs on platform \"none\""), "{told}");
}

#[test]
fn the_reference_application_is_the_contract_s() {
    let all = [
        ("UPGRADE_GIT_REMOTE", "https://robot:secret@git.test/plane.git"),
        ("PLATFORM_ACR_NAME", "PlatformACR"),
        ("EXEC_TOKEN", "0123456789abcdef"),
    ];
    let read = |env: &[(&str, &str)]| {
        Settings::of_environment(Path::new("/srv/plane"), &Environment::of(env)).map_err(|p| p.to_string())
    };
    let settings = read(&all).unwrap();
    let name = |text: &str| ComponentName::new(text).unwrap();
    let shape = |component: &str| {
        let c = &settings.components[&name(component)];
        (c.repository.clone(), c.dockerfile.clone(), c.context.clone(), c.args.clone(), c.commit_arg.clone())
    };
    let host = "platformacr.azurecr.io";
    let none = std::collections::BTreeMap::new;
    assert_eq!(shape("api"), (format!("{host}/elb-api"), "api/Dockerfile".to_owned(), ".".to_owned(), none(), None));
    assert_eq!(
        shape("frontend"),
        (
            format!("{host}/elb-frontend"),
            "web/Dockerfile".to_owned(),
            ".".to_owned(),
            none(),
            Some("GIT_COMMIT".to_owned())
        )
    );
    let base = [("TERMINAL_BASE_IMAGE".to_owned(), format!("{host}/elb-terminal-base:latest"))];
    let runtime = "terminal/Dockerfile.runtime".to_owned();
    assert_eq!(shape("terminal"), (format!("{host}/elb-terminal"), runtime, "terminal".to_owned(), base.into(), None));
    assert_eq!(settings.home, Path::new("/srv/plane"));
    assert_eq!(settings.shown_remote().as_deref(), Some("https://git.test/plane.git"));
    assert_eq!(settings.exec.as_ref().unwrap().url, "http://127.0.0.1:7682");

    let commit = recipes(&settings, &Manifest::default(), &"1.2.3-commit.0123456789ab".parse().unwrap()).unwrap();
    assert_eq!(commit[&name("frontend")].args["GIT_COMMIT"], "0123456789ab");
    assert!(commit.values().all(|recipe| recipe.unlabelled), "az sets no labels");
    assert!(!commit[&name("api")].args.contains_key("GIT_COMMIT"));

    let told = read(&[("PLATFORM_ACR_NAME", "x\"\ny")]).unwrap_err();
    assert!(told.contains("PLATFORM_ACR_NAME: \"x\\\"\\ny\" is not a container registry's name"), "{told}");
    assert!(told.contains("EXEC_TOKEN: is not set"), "{told}");
    for (list, fine) in [
        ("git.test", true),
        ("GIT.test, other.test", true),
        ("https://git.test/", true),
        ("https://git.test/plane.git", true),
        ("https://git.test/plan", false),
        ("https://git.test/plane", false),
        ("other.test", false),
        ("test", false),
        ("https://git.test.evil/", false),
    ] {
        let mut env = all.to_vec();
        env.push(("UPGRADE_GIT_REMOTE_ALLOWLIST", list));
        let told = read(&env);
        assert_eq!(told.is_ok(), fine, "{list}: {:?}", told.err());
    }
    assert!(Settings::is_in_environment(&Environment::of(&all)) && !Settings::is_in_environment(&Environment::of(&[])));
}

#[test]
fn the_service_is_reached_where_its_listener_publishes_it() {
    let at = |more: &str, revision: Option<&str>| {
        let env = [("REPLANK_REVISION", revision.unwrap_or_default())];
        parse(&format!("{GOOD}\n{more}"), &env).unwrap().reached_at().to_string()
    };
    let listener = "[listeners.upgrade]\npublish = 18086\ncontainer = \"replank\"\nport = ";
    assert_eq!(at("", None), "127.0.0.1:9000", "nothing publishes it");
    assert_eq!(at(&format!("{listener}9000\n"), None), "127.0.0.1:18086");
    assert_eq!(at(&format!("{listener}9000\n"), Some("r1")), "127.0.0.1:9000", "from inside of a controller");
    assert_eq!(at(&format!("{listener}9001\n"), None), "127.0.0.1:9000", "another port of the same container");
}
