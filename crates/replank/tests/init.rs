//! `replank init` as people use it: the real binary, on whole repositories and on tables of what is refused.
//!
//! `tests/init/accepted/NAME` is a repository with the configuration that it becomes, `tests/init/refused.txt` a table of
//! compose files with the words that refuse them. With `BLESS=1` expected configurations are written instead of compared.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use replank::config::Settings;
use replank::config::env::Environment;

struct World {
    dir: tempfile::TempDir,
}

impl World {
    /// A repository of this name with one Dockerfile.
    fn new(name: &str) -> Self {
        let world = Self { dir: tempfile::tempdir().unwrap() };
        fs::create_dir(world.dir.path().join(name)).unwrap();
        symlink(name, world.dir.path().join("repo")).unwrap();
        world.put("Dockerfile", "FROM scratch\n");
        world
    }

    fn repo(&self) -> PathBuf {
        fs::canonicalize(self.dir.path().join("repo")).unwrap()
    }

    fn home(&self) -> PathBuf {
        self.dir.path().join("home")
    }

    fn put(&self, path: &str, text: impl AsRef<[u8]>) {
        let path = self.repo().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn run(&self, args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_replank"))
            .arg("init")
            .args(args)
            .env_clear()
            .current_dir(self.repo())
            .output()
            .unwrap()
    }

    /// Exit code, standard output, standard error.
    fn told(&self, args: &[&str]) -> (i32, String, String) {
        let out = self.run(args);
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (out.status.code().unwrap(), text(out.stdout), text(out.stderr))
    }
}

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/init")
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name().to_str().unwrap().replace("dot.", "."));
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), &target).unwrap();
        }
    }
}

#[test]
fn repositories_become_the_configurations_beside_them() {
    for case in fs::read_dir(data().join("accepted")).unwrap().map(|entry| entry.unwrap().path()) {
        let name = case.file_name().unwrap().to_str().unwrap();
        let world = World::new(name);
        fs::remove_file(world.repo().join("Dockerfile")).unwrap();
        copy(&case.join("repository"), &world.repo());
        let home = world.home();
        let (code, told, error) = world.told(&["--output", home.to_str().unwrap()]);
        assert_eq!((code, error.as_str()), (0, ""), "{name}");
        assert!(told.contains("Next:"), "{told}");
        let file = home.join("replank.toml");
        let made = fs::read_to_string(&file).unwrap().replace(world.repo().to_str().unwrap(), "REPOSITORY");
        let expected = case.join("replank.toml");
        if std::env::var_os("BLESS").is_some() {
            fs::write(&expected, &made).unwrap();
        }
        assert_eq!(made, fs::read_to_string(&expected).unwrap(), "{name}");
        // As `replank deploy` reads it.
        let settings = Settings::load(&file, &Environment::default()).unwrap_or_else(|p| panic!("{name}: {p}"));
        assert!(settings.platform.containers.values().any(|container| container.controller), "{name}");
        for secret in settings.platform.containers.values().flat_map(|container| container.secrets.values()) {
            let replank_adapters::platform::docker::config::SecretSource::File(path) = secret else {
                panic!("{secret:?}")
            };
            assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o600, "{}", path.display());
        }
        for component in settings.components.values() {
            assert!(world.repo().join(&component.dockerfile).is_file(), "{name}: {}", component.dockerfile);
        }
        // What was only looked at is the same.
        let (code, shown, _) = world.told(&["--stdout"]);
        assert_eq!((code, shown.replace(world.repo().to_str().unwrap(), "REPOSITORY")), (0, made), "{name}");
    }
}

#[test]
fn what_cannot_be_reproduced_is_refused_by_name_and_nothing_is_written() {
    let table = fs::read_to_string(data().join("refused.txt")).unwrap();
    let cases: Vec<&str> = table.split("\n=== ").skip(1).collect();
    assert!(cases.len() > 60, "{}", cases.len());
    for case in cases {
        let (name, rest) = case.split_once('\n').unwrap();
        let (compose, expected) = rest.split_once("\n--- ").unwrap();
        let world = World::new("shop");
        world.put("compose.yaml", compose);
        let home = world.home();
        let (code, told, error) = world.told(&["--output", home.to_str().unwrap()]);
        assert_eq!(code, 2, "{name}: {told}{error}");
        for words in expected.trim().split("\n--- ") {
            assert!(error.contains(words.trim()), "{name}:\nwanted {words}\ngot {error}");
        }
        assert!(!home.exists() && !world.repo().join("controller").exists(), "{name}");
    }
}

#[test]
fn hostile_input_ends_at_a_limit() {
    let world = World::new("shop");
    let look = |words: &str| {
        let (code, _, error) = world.told(&["--stdout"]);
        assert_eq!(code, 2, "{error}");
        assert!(error.contains(words), "wanted {words}, got {error}");
        assert!(error.len() < 20_000 && !error.contains('\u{1b}'), "{error}");
    };
    let mut bomb = String::from("x-0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
    for n in 1..12 {
        bomb.push_str(&format!("x-{n}: &a{n} [{}]\n", vec![format!("*a{}", n - 1); 10].join(", ")));
    }
    world.put("compose.yaml", bomb);
    look("compose.yaml");
    world.put("compose.yaml", format!("a: {}", "[".repeat(100_000)));
    look("compose.yaml");
    world.put("compose.yaml", vec![b' '; 2 * 1024 * 1024]);
    look("has more than 1048576 bytes");
    world.put("compose.yaml", b"services: {web: {build: \"\xff\"}}");
    look("is not UTF-8 at byte");
    world.put("compose.yaml", "services:\n  web: {build: .}\n  web: {build: .}\n");
    look("compose.yaml:3");
    world.put("compose.yaml", "services:\n  \"a\\e[2Jb\": {build: .}\n");
    look("cannot be a container's name");
    let many: String = (0..300).map(|n| format!("  s{n}: {{build: .}}\n")).collect();
    world.put("compose.yaml", format!("services:\n{many}"));
    look("at most 256 are read");
    // A pipe that nobody writes into is not waited for.
    let made = Command::new("mkfifo").arg(world.repo().join(".env")).status().unwrap();
    assert!(made.success());
    world.put("compose.yaml", "services:\n  web: {build: .}\n");
    look(".env: is not a file");
    fs::remove_file(world.repo().join(".env")).unwrap();
    // A link that leads out is not followed, and a file that is none is not read.
    fs::remove_file(world.repo().join("compose.yaml")).unwrap();
    symlink("/etc/passwd", world.repo().join("compose.yaml")).unwrap();
    assert!(!world.told(&["--stdout"]).1.contains("root:"));
    look_at(&world, &["--file", "../x.yaml"], "leaves the repository");
    look_at(&world, &["--file", "/etc/passwd"], "is absolute");
    look_at(&world, &["--file", "nothing.yaml"], "there is no nothing.yaml");
    look_at(&world, &["/nonexistent"], "cannot be read");
}

fn look_at(world: &World, args: &[&str], words: &str) {
    let (code, _, error) = world.told(&[args, &["--stdout"]].concat());
    assert!(code == 2 && error.contains(words), "wanted {words}, got {code} {error}");
}

#[test]
fn words_of_others_stay_in_their_comments_and_quotes() {
    let world = World::new("shop");
    world.put(
        "compose.yaml",
        r#"
services:
  web:
    build: .
    command: ["a\"b", "\x7f\n[policy]"]
    healthcheck: { test: "x\n[components.evil]" }
    environment: { A: "${X}'\"\"\"\n" }
  db:
    image: "postgres\n[server]\nlisten = 1"
"#,
    );
    world.put(".env", "X='\u{1b}[2J'\n");
    let (code, toml, error) = world.told(&["--stdout"]);
    assert_eq!(code, 0, "{error}");
    let settings = Settings::parse("x", Path::new("/x/replank.toml"), &toml, &Environment::default()).unwrap();
    assert_eq!(settings.components.len(), 2, "{toml}");
    let web = &settings.platform.containers[&replank_core::words::ContainerName::new("web").unwrap()];
    assert_eq!(web.command.as_deref().unwrap(), ["a\"b", "\u{7f}\n[policy]"]);
    assert_eq!(web.env["A"], "\u{1b}[2J'\"\"\"\n");
    assert!(!toml.contains('\u{1b}') && !toml.contains('\u{7f}'));
}

#[test]
fn nothing_is_overwritten_unasked() {
    let world = World::new("shop");
    world.put("compose.yaml", "services:\n  web: { build: ., environment: { TOKEN: s3cret } }\n");
    let home = world.home();
    let args = ["--home", home.to_str().unwrap()];
    let (code, told, error) = world.told(&args);
    assert_eq!(code, 0, "{error}");
    assert!(!told.contains("s3cret") && !fs::read_to_string(home.join("replank.toml")).unwrap().contains("s3cret"));
    fs::write(home.join("replank.toml"), "mine").unwrap();
    let (code, _, error) = world.told(&args);
    assert!(code == 3 && error.contains("--force"), "{code} {error}");
    assert_eq!(fs::read_to_string(home.join("replank.toml")).unwrap(), "mine");
    // A link in the way is replaced and never followed.
    fs::remove_file(home.join("secrets/TOKEN")).unwrap();
    fs::write(world.dir.path().join("victim"), "precious").unwrap();
    symlink(world.dir.path().join("victim"), home.join("secrets/TOKEN")).unwrap();
    assert_eq!(world.told(&args).0, 3);
    let (code, _, error) = world.told(&[&args[..], &["--force"]].concat());
    assert_eq!(code, 0, "{error}");
    assert_eq!(fs::read_to_string(home.join("secrets/TOKEN")).unwrap(), "s3cret");
    assert_eq!(fs::read_to_string(world.dir.path().join("victim")).unwrap(), "precious");
    assert!(fs::read_to_string(home.join("replank.toml")).unwrap().contains("[containers.web]"));

    // Neither through a directory of the repository that leads out of it.
    let world = World::new("shop");
    world.put("compose.yaml", "services:\n  web: { build: . }\n");
    let outside = world.dir.path().join("outside");
    fs::create_dir(&outside).unwrap();
    symlink(&outside, world.repo().join("controller")).unwrap();
    let (code, _, error) = world.told(&["--output", world.home().to_str().unwrap()]);
    assert!(code != 0 && error.contains("leads out of the repository"), "{code} {error}");
    assert!(fs::read_dir(&outside).unwrap().next().is_none());
}

#[test]
fn scripts_get_the_classification() {
    let world = World::new("shop");
    world.put(
        "compose.yaml",
        "services:\n  Web_App: { build: ., ports: [\"80:8080\"], depends_on: [redis] }\n  redis: { image: redis }\n  bad: { build: ., pid: host }\n",
    );
    // In the checkout and without a target there is only something to look at.
    let (code, out, _) = world.told(&["--json"]);
    assert_eq!(code, 2);
    let found: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(found["refused"][0]["key"], "services.bad.pid");
    assert_eq!(found["refused"][0]["line"], 4);
    world.put(
        "compose.yaml",
        "services:\n  Web_App: { build: ., ports: [\"80:8080\"], depends_on: [redis] }\n  redis: { image: redis }\n",
    );
    let (code, out, _) = world.told(&["--json"]);
    let found: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &found["application"]), (0, &"shop".into()));
    let services = found["services"].as_array().unwrap();
    let told: Vec<_> = services
        .iter()
        .map(|s| (s["service"].as_str().unwrap(), s["kind"].as_str().unwrap(), &s["container"]))
        .collect();
    assert_eq!(told, [("Web_App", "web", &"web-app".into()), ("redis", "third-party", &serde_json::Value::Null)]);
    assert!(services[0]["notes"][0].as_str().unwrap().contains("called web-app here"), "{out}");
    assert_eq!(found["files"], serde_json::json!([]));
    let (code, _, error) = world.told(&[]);
    assert!(code == 2 && error.contains("--output"), "the home is not the checkout: {error}");
}

mod mutants {
    //! Compose files that nobody wrote: whatever they say, there is an answer, and what is accepted is a configuration.

    use proptest::prelude::*;
    use replank::init::{Wishes, read};

    use super::{World, data, fs};

    const PARTS: [&str; 24] = [
        "\n",
        " ",
        ":",
        "- ",
        "[",
        "]",
        "{",
        "}",
        "*app",
        "&app ",
        "<<: *app",
        "\"",
        "'",
        "$",
        "${X:-",
        "${DB_PASSWORD}",
        "null",
        "0",
        "-1",
        "/",
        "../",
        "\u{7f}",
        "\u{202e}",
        "!x ",
    ];

    proptest! {
        #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
        #[test]
        fn of_compose_files_end_in_an_answer(cuts in prop::collection::vec((0.0..1.0_f64, 0_usize..40, 0..PARTS.len()), 1..6)) {
            let mut text = fs::read_to_string(data().join("accepted/shop/repository/compose.yaml")).unwrap();
            for (at, length, part) in cuts {
                let floor = |at: usize| (0..=at.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
                let from = floor((at * text.len() as f64) as usize);
                text.replace_range(from..floor(from + length).max(from), PARTS[part]);
            }
            let world = World::new("shop");
            world.put("compose.yaml", &text);
            for file in ["api", "web", "cron"] {
                world.put(&format!("{file}/Dockerfile"), "FROM scratch\n");
            }
            world.put("api.env", "A=1\n");
            world.put(".env", "DB_PASSWORD=x\n");
            let wishes = Wishes {
                repository: world.repo(), compose: None, application: Some("shop".into()), project: None, image: "x".into(), target: None,
            };
            if let Ok(outcome) = read(&wishes) {
                for refusal in &outcome.refused {
                    prop_assert!(!refusal.what.contains("not valid TOML"), "{refusal}\n{text}\n{}", outcome.toml);
                    prop_assert!(!refusal.advice.is_empty(), "{refusal}");
                }
                prop_assert!(!outcome.toml.contains(['\u{7f}', '\u{202e}']), "{}", outcome.toml);
            }
        }
    }
}
