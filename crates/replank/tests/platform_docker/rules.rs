//! The rules that keep a dead driver's late changes from doing harm, and what a stop owes to open requests.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use replank_adapters::platform::docker::Vantage;
use replank_core::fault::Class;
use replank_core::ports::{Ask, Change, Platform as _, Running};
use replank_core::record::Deployment;

use crate::fixture::{App, until};
use crate::{name, settle, shift, start, stop};

/// Every container's reboot policy, by name.
fn policies(app: &App, deployment: &Deployment) -> Vec<String> {
    app.state("{{.HostConfig.RestartPolicy.Name}}", deployment)
}

fn stop_only(deployment: &Deployment, container: &str) -> Change {
    Change::Stop { deployment: deployment.clone(), containers: BTreeSet::from([name(container)]) }
}

async fn is_refused(app: &App, change: &Change) {
    match app.platform.change(change).await {
        Err(fault) => assert_eq!(fault.class, Class::Conflict, "{}", fault.chain()),
        Ok(()) => panic!("carried out: {change:?}"),
    }
}

async fn all_run(app: &App, deployment: &Deployment) -> bool {
    let seen = app.platform.observe(&Ask::default()).await.expect("observe");
    seen.revisions[&deployment.revision].containers.values().all(|c| c.running == Running::Running)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_late_stop_does_not_reach_what_takes_traffic() {
    let app = App::new("latestop").await;
    let (blue, green) = (app.deployment("r1", "0.1.0").await, app.deployment("r2", "0.2.0").await);
    app.does(&start(&blue)).await;
    app.does(&shift(&blue, 1, None)).await;
    app.does(&settle(&blue, &[], 2)).await;
    app.does(&start(&green)).await;
    is_refused(&app, &stop(&blue)).await;
    is_refused(&app, &stop_only(&blue, "web")).await;
    assert_eq!(policies(&app, &blue), ["always", "always"], "refused before anything was touched");
    assert!(all_run(&app, &blue).await);
    // What may not overlap makes room although traffic goes to its revision.
    app.does(&stop_only(&blue, "worker")).await;
    assert_eq!(policies(&app, &blue), ["always", "no"]);
    app.does(&start(&blue)).await;

    // Inside a confirm window neither side is retired, also where a restarted proxy serves the fallback.
    app.does(&shift(&green, 3, Some(&blue))).await;
    for restarted in [false, true] {
        if restarted {
            app.docker(&[
                "restart",
                "-t",
                "1",
                &replank_adapters::platform::docker::names::proxy(&app.config.application),
            ]);
            app.until_serves("0.1.0").await;
        }
        for change in [
            stop(&blue),
            stop(&green),
            Change::Remove { revision: blue.revision.clone() },
            Change::Remove { revision: green.revision.clone() },
        ] {
            is_refused(&app, &change).await;
        }
        assert!(all_run(&app, &blue).await && all_run(&app, &green).await);
    }
    app.does(&shift(&green, 4, None)).await;
    for _ in 0..2 {
        app.does(&stop(&blue)).await;
        assert_eq!(policies(&app, &blue), ["no", "no"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_runs_whole_is_settled() {
    let app = App::new("whole").await;
    let (blue, green) = (app.deployment("r1", "0.1.0").await, app.deployment("r2", "0.2.0").await);
    app.does(&start(&blue)).await;
    app.does(&shift(&blue, 5, None)).await;
    is_refused(&app, &settle(&blue, &[], 4)).await;
    app.does(&stop_only(&blue, "worker")).await;
    is_refused(&app, &settle(&blue, &[], 6)).await;
    app.docker(&["rm", "-f", &app.full_name(&blue, "worker")]);
    is_refused(&app, &settle(&blue, &[], 6)).await;
    let web = app.docker(&["inspect", "-f", "{{.HostConfig.RestartPolicy.Name}}", &app.full_name(&blue, "web")]);
    assert_eq!(web, "no", "refused before any policy was touched");
    assert_eq!(app.proxy_state().await.routes.map(|r| r.generation), Some(5));

    app.does(&start(&blue)).await;
    app.does(&settle(&blue, &[], 6)).await;
    // A refused settle of another leaves what is settled as it is.
    app.does(&start(&green)).await;
    app.does(&stop_only(&green, "worker")).await;
    is_refused(&app, &settle(&green, &[&blue], 7)).await;
    assert_eq!((policies(&app, &blue), policies(&app, &green)), (vec!["always".into(); 2], vec!["no".into(); 2]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revision_returns_alone_when_all_of_it_does() {
    let app = App::new("alone").await;
    let (blue, green) = (app.deployment("r1", "0.1.0").await, app.deployment("r2", "0.2.0").await);
    app.does(&start(&blue)).await;
    app.does(&shift(&blue, 1, None)).await;
    let alone = async |deployment: &Deployment| {
        let seen = app.platform.observe(&Ask::default()).await.expect("observe");
        seen.revisions[&deployment.revision].returns_alone
    };
    assert!(!alone(&blue).await);
    app.does(&settle(&blue, &[], 2)).await;
    assert!(alone(&blue).await);
    // Whoever serves: one container less is not all of it.
    for serving in [true, false] {
        app.docker(&["update", "--restart", "no", &app.full_name(&blue, "worker")]);
        assert!(!alone(&blue).await, "serving: {serving}");
        app.docker(&["update", "--restart", "always", &app.full_name(&blue, "worker")]);
        app.does(&start(&green)).await;
        app.does(&shift(&green, 3, None)).await;
    }
    // A container that an operator stopped still returns after a reboot; one that Replank stops does not.
    app.docker(&["stop", "-t", "1", &app.full_name(&blue, "worker")]);
    app.does(&stop(&blue)).await;
    assert_eq!(policies(&app, &blue), ["no", "no"]);
    assert!(!alone(&blue).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_halted_revision_is_stopped_whole_and_can_still_be_read() {
    let app = App::new("halt").await;
    let (blue, green) = (app.deployment("r1", "0.1.0").await, app.deployment("r2", "0.2.0").await);
    app.does(&start(&blue)).await;
    app.does(&start(&green)).await;
    app.does(&shift(&green, 1, Some(&blue))).await;
    let halt = |deployment: &Deployment| Change::Halt { revision: deployment.revision.clone() };
    for routed in [&blue, &green] {
        is_refused(&app, &halt(routed)).await;
    }
    app.does(&shift(&blue, 2, None)).await;
    let myself = app.platform_at(Vantage::Inside(green.revision.clone()));
    let fault = myself.change(&halt(&green)).await.expect_err("myself");
    assert_eq!(fault.class, Class::Conflict);
    // Settled once, as a release is that failed later.
    for container in ["web", "worker"] {
        app.docker(&["update", "--restart", "always", &app.full_name(&green, container)]);
    }
    let ids = app.state("{{.Id}}", &green);
    for _ in 0..2 {
        app.does(&halt(&green)).await;
    }
    assert_eq!(policies(&app, &green), ["no", "no"]);
    assert_eq!(app.state("{{.State.Running}}", &green), ["false", "false"]);
    assert_eq!(app.state("{{.Id}}", &green), ids);
    app.docker(&["logs", &app.full_name(&green, "web")]);
    let seen = app.platform.observe(&Ask::default()).await.expect("observe");
    assert!(seen.revisions[&green.revision].stopped_at.is_some());
    assert!(all_run(&app, &blue).await);
    // What is not there is halted.
    app.does(&Change::Remove { revision: green.revision.clone() }).await;
    app.does(&halt(&green)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_waits_for_open_requests_and_not_for_ever() {
    const GRACE: u32 = 4;
    let app = App::with("drain", |config| {
        let web = config.containers.get_mut(&name("web")).expect("web");
        // Ends at once when it is told to: whoever tells it too early breaks an answer off.
        let script = "trap 'exit 0' TERM; busybox httpd -f -p 8080 -h /www & wait";
        web.command = Some(["sh", "-c", script].map(str::to_owned).to_vec());
        web.stop_grace_seconds = GRACE;
    })
    .await;
    let (blue, green) = (app.deployment("r1", "0.1.0").await, app.deployment("r2", "0.2.0").await);
    app.does(&start(&blue)).await;
    app.does(&start(&green)).await;
    app.does(&shift(&blue, 1, None)).await;
    app.until_passed(&blue).await;
    app.until_direct(&green).await;
    let id = |deployment| app.state("{{.Id}}", deployment)[0].clone();
    let open = async |id: &str| app.proxy_state().await.open.get(id).copied().unwrap_or(0);
    let until_open = async |id: &str| {
        let end = Instant::now() + Duration::from_secs(20);
        while open(id).await == 0 {
            assert!(Instant::now() < end, "no open request was seen");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };

    let slow = app.get("/cgi-bin/slow");
    until_open(&id(&blue)).await;
    app.does(&shift(&green, 2, None)).await;
    let begun = Instant::now();
    app.does(&stop(&blue)).await;
    let took = begun.elapsed();
    let answer = slow.join().expect("client");
    assert!(answer.contains("begun") && answer.contains("done"), "broken off: {answer:?}");
    assert!(took < Duration::from_secs(u64::from(GRACE)), "it had nothing left to wait for: {took:?}");
    assert_eq!(app.state("{{.State.Running}}", &blue), ["false", "false"]);

    // A stream without an end is cut after the grace, once.
    let stream = app.get("/cgi-bin/stream");
    until_open(&id(&green)).await;
    app.does(&start(&blue)).await;
    app.until_direct(&blue).await;
    app.does(&shift(&blue, 3, None)).await;
    let begun = Instant::now();
    app.does(&stop(&green)).await;
    let took = begun.elapsed();
    let grace = Duration::from_secs(u64::from(GRACE));
    assert!(took >= grace, "the stream was cut before its grace was over: {took:?}");
    assert!(took < 2 * grace, "the stream held the stop up: {took:?}");
    let events = stream.join().expect("client");
    assert!(events.matches("data: x").count() > 10, "{events:.300}");
    until("the proxy forgets it", || app.state("{{.State.Running}}", &green) == ["false", "false"]).await;
    assert_eq!(open(&id(&green)).await, 0);
}
