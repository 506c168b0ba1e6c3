//! What `replank init` makes of a compose file runs as it ran under compose: beside the third-party container that stays there,
//! on its network, and with the data of its volume.

use std::fs;

use replank_testbed::images;

use crate::rig::{Options, Rig, get, said};

const COMPOSE: &str = r#"
name: shop
services:
  web:
    build: app
    ports: ["127.0.0.1:WEB:8080"]
    environment: { GREETING: hello, API_TOKEN: hunter2 }
    healthcheck: { test: ["CMD", "wget", "-qO-", "http://localhost:8080/version"] }
    depends_on: [cache]
  worker:
    build: app
    command: sleep 100000
    volumes: ["data:/data", "./app:/never"]
    user: "65534:65534"
  cache:
    image: redis:7
volumes: { data: {} }
"#;

#[test]
fn what_was_made_of_a_compose_file_runs_as_it_did() {
    let rig = Rig::prepare(Options::default());
    let docker = |line: &str| rig.engine.docker(&line.split(' ').collect::<Vec<_>>()).unwrap();
    let checkout = rig.home.parent().unwrap().join("checkout");
    for file in ["Dockerfile", "www/version", "www/index.html"] {
        let to = checkout.join("app").join(file);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::write(to, if file == "Dockerfile" { crate::rig::DOCKERFILE } else { "x" }).unwrap();
    }
    let compose = checkout.join("compose.yaml");
    fs::write(&compose, COMPOSE.replace("WEB", &rig.web.to_string())).unwrap();
    let home = rig.home.parent().unwrap().join("shop");
    let init = ["init", checkout.to_str().unwrap(), "--output", home.to_str().unwrap()];
    // The build context over the image's own files: refused, and then taken out as advised.
    let out = rig.cli(&init);
    assert!(out.status.code() == Some(2) && said(&out).contains("./app\" is part of this checkout"), "{}", said(&out));
    let mended = fs::read_to_string(&compose).unwrap().replace(", \"./app:/never\"", "");
    fs::write(&compose, mended).unwrap();
    let out = rig.cli(&init);
    assert!(out.status.success(), "{}", said(&out));

    // As compose left it: its network with the container that stays, and its volume with something in it.
    docker("network create shop_default");
    docker(&format!("run --detach --name cache --network shop_default {} sleep 100000", images::BUSYBOX));
    docker(&format!("run --rm --volume shop_data:/data {} sh -c echo${{IFS}}kept>/data/file", images::BUSYBOX));

    // The test's remote and engine; and no controller, as its image would need git.
    let file = home.join("replank.toml");
    let made = fs::read_to_string(&file).unwrap();
    let mut config = String::new();
    for table in made.split("\n[") {
        if ["components.controller]", "containers.controller]", "listeners.upgrade]"]
            .iter()
            .any(|c| table.starts_with(c))
        {
            continue;
        }
        if !config.is_empty() {
            config.push_str("\n[");
        }
        config.push_str(table);
    }
    let remote = format!("remote = \"{}\"\nallow_loopback = true", rig.git.url("app"));
    let config = config.replace("remote = \"https://git.example.com/acme/shop.git\"", &remote);
    assert!(config.contains(&remote) && !config.contains("hunter2"), "{config}");
    fs::write(&file, format!("{config}\n[docker]\nsocket = \"{}\"\n", rig.engine.socket().display())).unwrap();
    let out = rig.command(&["deploy", "--config", file.to_str().unwrap()]).output().unwrap();
    assert!(out.status.success(), "{}", said(&out));

    assert_eq!(
        get(rig.web, "/version", "").map(|(code, body)| (code, body.trim().to_owned())),
        Some((200, "version=0.1.0;".to_owned()))
    );
    let name = |container: &str| {
        let all = docker("ps --format {{.Names}} --filter label=io.replank.application=shop");
        let found = all.lines().find(|name| name.ends_with(&format!("-{container}"))).map(str::to_owned);
        found.unwrap_or_else(|| panic!("no {container}: {all}"))
    };
    let (web, worker) = (name("web"), name("worker"));
    let env = docker(&format!("exec {web} env"));
    assert!(env.contains("GREETING=hello") && env.contains("API_TOKEN=hunter2"), "{env}");
    for container in [&web, &worker] {
        let networks = docker(&format!("inspect --format {{{{.NetworkSettings.Networks}}}} {container}"));
        assert!(networks.contains("shop_default"), "{networks}");
    }
    assert_eq!(docker(&format!("exec {worker} cat /data/file")).trim(), "kept");
    assert!(docker(&format!("exec {worker} id")).contains("uid=65534"));
}
