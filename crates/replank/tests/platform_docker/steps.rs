//! Data steps on a real engine: each runs once, whoever asks, and is no part of what its revision runs.

use std::path::Path;
use std::sync::Mutex;

use replank_adapters::platform::docker::config::{BackupConfig, MigrateConfig, MountConfig};
use replank_core::data::{DataStep, Schema, StepKind};
use replank_core::fault::Class;
use replank_core::ports::{Ask, Change, Clock as _, Log, Platform as _, Progress, Stream};
use replank_core::record::Deployment;
use replank_core::words::{ComponentName, JobId, Millis, Nonce, OpKey};
use tempfile::TempDir;

use super::fixture::{App, WallClock};
use super::{name, start};

#[derive(Default)]
struct Lines(Mutex<Vec<u8>>);

impl Log for Lines {
    fn write(&self, _: Stream, bytes: &[u8]) {
        self.0.lock().expect("lock").extend_from_slice(bytes);
    }
    fn progress(&self, _: Progress) {}
}

impl Lines {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().expect("lock")).into_owned()
    }
}

/// An application whose web container keeps its data in `data`, with the operator's migration and backup.
async fn app(application: &str, data: &TempDir, migrate: &str) -> App {
    let mount = MountConfig { source: data.path().display().to_string(), target: "/data".to_owned(), read_only: false };
    let shell = |text: &str| vec!["sh".to_owned(), "-c".to_owned(), text.to_owned()];
    let migrate = shell(migrate);
    App::with(application, |config| {
        config.containers.get_mut(&name("web")).expect("web").mounts.push(mount);
        let container = Some(name("web"));
        config.data.migrate.insert(component(), MigrateConfig { command: migrate, container });
        let command = shell("echo saved > /data/backup");
        config.data.backup = Some(BackupConfig { container: name("web"), command });
    })
    .await
}

fn component() -> ComponentName {
    ComponentName::new("web").expect("component")
}

fn key(of: &str) -> OpKey {
    OpKey::derive(&JobId::new("the-job").expect("job"), of, 1, &Nonce::new("0".repeat(32)).expect("nonce"))
}

fn in_seconds(seconds: u64) -> Millis {
    WallClock.now().plus(seconds * 1_000)
}

fn step(deployment: &Deployment, kind: StepKind) -> DataStep {
    deployment.plan.data.steps.iter().find(|step| step.kind == kind).expect("the step is planned").clone()
}

fn read(data: &TempDir, file: &str) -> String {
    std::fs::read_to_string(data.path().join(file)).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_step_runs_once_whoever_asks_and_how_often() {
    let data = tempfile::tempdir().expect("data");
    let app = app("once-step", &data, "echo at work; echo x >> /data/runs; sleep 1; echo done >&2").await;
    let blue = app.deployment("r1", "0.1.0").await;
    let names: Vec<&str> = blue.plan.data.steps.iter().map(|step| step.name.as_str()).collect();
    assert_eq!(names, ["backup", "migrate-web"], "the backup is the first");
    let migrate = step(&blue, StepKind::Migrate);
    let (lines, others, key) = (Lines::default(), Lines::default(), key("migrate"));
    // Two controllers at the same moment, as after a take-over.
    let (one, two) = tokio::join!(
        app.platform.run_step(&blue, &migrate, &key, in_seconds(60), &lines),
        app.platform.run_step(&blue, &migrate, &key, in_seconds(60), &others),
    );
    assert_eq!((one.expect("one"), two.expect("two")), (0, 0));
    let again = app.platform.run_step(&blue, &migrate, &key, in_seconds(60), &Lines::default()).await;
    assert_eq!(again.expect("again"), 0, "how it ended is read, and nothing runs");
    assert_eq!(read(&data, "runs"), "x\n");
    assert_eq!(lines.text().lines().collect::<Vec<_>>(), ["at work", "done"]);

    // It is no part of the revision, and goes with it.
    app.does(&start(&blue)).await;
    let seen = app.platform.observe(&Ask::default()).await.expect("observe");
    assert_eq!(seen.revisions[&blue.revision].containers.len(), 2);
    let full = app.full_name(&blue, "migrate-web");
    assert_eq!(app.docker(&["inspect", "-f", "{{.HostConfig.RestartPolicy.Name}}", &full]), "no");
    app.does(&super::stop(&blue)).await;
    app.does(&Change::Remove { revision: blue.revision.clone() }).await;
    assert_eq!(app.docker(&["ps", "-aq", "--filter", &format!("name={full}")]), "");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_is_made_by_what_runs() {
    let data = tempfile::tempdir().expect("data");
    let app = app("backup-step", &data, "exit 3").await;
    let (blue, green) = (app.deployment("r1", "0.1.0").await, app.deployment("r2", "0.2.0").await);
    app.does(&start(&blue)).await;
    let backup = step(&green, StepKind::Backup);
    let code = app.platform.run_step(&blue, &backup, &key("backup"), in_seconds(60), &Lines::default()).await;
    assert_eq!((code.expect("backup"), read(&data, "backup").as_str()), (0, "saved\n"));
    let image = app.docker(&[
        "inspect",
        "-f",
        "{{.Config.Image}}",
        &format!("{}-{}", app.full_name(&blue, "backup"), key("backup")),
    ]);
    assert_eq!(image, blue.images[&component()].reference());
    // The next job makes its own, while the same revision serves: the first one's container is no obstacle.
    let next = app.deployment("r3", "0.2.0").await;
    std::fs::remove_file(data.path().join("backup")).expect("the first copy");
    let code = app
        .platform
        .run_step(&blue, &step(&next, StepKind::Backup), &key("next"), in_seconds(60), &Lines::default())
        .await;
    assert_eq!((code.expect("the second backup"), read(&data, "backup").as_str()), (0, "saved\n"));
    // A migration's exit code is passed on as it is.
    let migrate = step(&green, StepKind::Migrate);
    let code = app.platform.run_step(&green, &migrate, &key("migrate"), in_seconds(60), &Lines::default()).await;
    assert_eq!(code.expect("migrate"), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_step_without_end_is_ended_at_its_budget() {
    let data = tempfile::tempdir().expect("data");
    let app = app("slow-step", &data, "echo begun; exec sleep 600").await;
    let green = app.deployment("r2", "0.2.0").await;
    let migrate = step(&green, StepKind::Migrate);
    let lines = Lines::default();
    let fault = app.platform.run_step(&green, &migrate, &key("m"), in_seconds(2), &lines).await.expect_err("too long");
    assert_eq!(fault.class, Class::Permanent, "{}", fault.chain());
    assert!(fault.what.contains("budget"), "{fault}");
    assert_eq!(lines.text(), "begun\n");
    let full = app.full_name(&green, "migrate-web");
    assert_eq!(app.docker(&["inspect", "-f", "{{.State.Running}}", &full]), "false");
    // Whoever asks again is told how it ended, and it does not run a second time.
    let code = app.platform.run_step(&green, &migrate, &key("m"), in_seconds(60), &Lines::default()).await;
    assert_ne!(code.expect("its end"), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_look_alike_of_a_data_step_is_a_conflict() {
    let data = tempfile::tempdir().expect("data");
    let app = app("alike-step", &data, "echo x >> /data/runs").await;
    let green = app.deployment("r2", "0.2.0").await;
    let migrate = step(&green, StepKind::Migrate);
    let full = app.full_name(&green, "migrate-web");
    let foreign = app.docker(&["create", "--name", &full, &app.image("0.1.0"), "sleep", "60"]);
    let run = |of: &str| {
        let key = key(of);
        let (platform, green, migrate) = (&app.platform, &green, &migrate);
        async move { platform.run_step(green, migrate, &key, in_seconds(60), &Lines::default()).await }
    };
    let fault = run("m").await.expect_err("look-alike");
    assert_eq!(fault.class, Class::Conflict, "{}", fault.chain());
    app.docker(&["rm", "-f", &foreign]);
    assert_eq!(run("m").await.expect("its own"), 0);
    // Another job's step of the same name is as foreign.
    assert_eq!(run("other").await.expect_err("another key").class, Class::Conflict);
    assert_eq!(read(&data, "runs"), "x\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_release_says_of_its_data_is_planned() {
    let data = tempfile::tempdir().expect("data");
    let app = app("plan-step", &data, "true").await;
    let plan = |manifest: serde_json::Value| {
        let app = &app;
        async move { app.plan_of(manifest).await.expect("plan").data }
    };
    let asked =
        plan(serde_json::json!({"migrate": {"web": ["up", "now"]}, "schema": "one-way", "back_to": "0.1.0"})).await;
    assert_eq!((asked.schema, asked.back_to), (Schema::OneWay, Some("0.1.0".parse().expect("version"))));
    let spec = &asked.steps[1].spec;
    assert_eq!(spec["run"]["entrypoint"], serde_json::json!(["up", "now"]), "the release's word comes first");
    assert_eq!(spec["run"]["command"], serde_json::Value::Null, "and is all that runs");
    assert_eq!(spec["run"]["mounts"][0]["target"], "/data");
    assert!(Path::new(&spec["run"]["mounts"][0]["source"].as_str().expect("source")).is_absolute());
    // Nothing to save where nothing changes.
    let mut quiet = app.config.clone();
    quiet.data.migrate.clear();
    let platform = replank_adapters::platform::docker::DockerPlatform::new(
        quiet,
        replank_adapters::platform::docker::Vantage::Host,
        app.clock(),
    );
    let fetched = |manifest| replank_core::phase::Fetched { manifest, ..Default::default() };
    let version = "0.2.0".parse().expect("version");
    let images = app.deployment("r9", "0.2.0").await.images;
    let platform = platform.expect("platform");
    let plan = |schema: &str| {
        let (platform, images, version) = (&platform, &images, &version);
        let fetched = fetched(serde_json::json!({"schema": schema}));
        async move { platform.plan(&fetched, images, version).await.expect("plan").data.steps.len() }
    };
    assert_eq!((plan("compatible").await, plan("unknown").await, plan("one-way").await), (0, 1, 1));
    let odd = app.plan_of(serde_json::json!({"migrate": {"web": 7}})).await.expect_err("no command");
    assert_eq!(odd.class, Class::Permanent);
}
