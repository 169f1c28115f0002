//! One that does not answer holds up nobody else.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test tells its figures")]

use std::time::Duration;

use godwit_tests::{Answer, Body, Cloud, Daemon, Followed, pause, resume, within};
use serde_json::Value;

/// How long anything may take that does not need the site that is stopped.
const SOON: Duration = Duration::from_secs(15);

fn pid(cloud: &Cloud, which: Daemon) -> i32 {
    let path = cloud.site_dir(which).join("run/daemon.pid");
    std::fs::read_to_string(path).unwrap().trim().parse().unwrap()
}

/// Runs a command that must come to its end soon and well.
fn soon(cloud: &Cloud, args: &[&str]) -> Answer {
    let answer = cloud.run(args);
    eprintln!("{args:?}: {:?}", answer.took);
    assert_eq!(answer.exit, 0, "{answer:?}");
    assert!(answer.took < SOON, "{args:?} took {:?}", answer.took);
    answer
}

/// Write transactions of the registry since the center started.
fn commits(cloud: &Cloud) -> u64 {
    let text = cloud.api().ask("GET", "/metrics", Body::None).text;
    let line = text.lines().find_map(|l| l.strip_prefix("godwit_registry_commits_total"));
    line.unwrap_or_else(|| panic!("{text}")).trim().parse().unwrap()
}

/// What was told of one object, each change beginning where the one before ended.
fn story(of: &Followed, name: &str) -> Vec<Value> {
    let all = of.json();
    assert!(all.iter().all(|e| e["kind"] != "reset"), "nothing was forgotten: {all:?}");
    let events: Vec<_> = all.into_iter().filter(|e| e["name"] == name).collect();
    for two in events.windows(2).filter(|two| two[0]["new"].is_object()) {
        assert_eq!(two[0]["new"], two[1]["old"], "something was missed: {events:?}");
    }
    events
}

fn became(of: &Followed, name: &str, state: &str) {
    within(SOON * 6, &format!("'{name}' to be told to be {state}"), || {
        let events = story(of, name);
        events.iter().any(|e| e["new"]["state"] == state).then_some(())
    });
}

#[test]
fn a_stopped_site_holds_up_nobody_and_idle_ones_cost_nothing() {
    let mut cloud = Cloud::start();
    cloud.bring_substrate();
    let mut machines = cloud.follow(&["vm", "list", "--watch", "-o", "json"]);
    let sites = cloud.follow(&["site", "list", "--watch", "-o", "json"]);
    within(SOON, "the sites", || (sites.lines().len() == 2).then_some(()));
    // Three reports of each site, at least.
    let before = commits(&cloud);
    let begun = std::time::Instant::now();
    let seen = |cloud: &Cloud| cloud.ok(&["site", "list"])[0]["last_seen"].as_u64().unwrap();
    for _ in 0..3 {
        let last = seen(&cloud);
        within(SOON * 4, "the next report", || (seen(&cloud) > last).then_some(()));
    }
    assert_eq!(commits(&cloud), before, "nothing was written in {:?}", begun.elapsed());

    let ap = pid(&cloud, Daemon::Ap);
    pause(ap);
    let create = |name: &str, site: &[&str]| {
        let args = ["vm", "create", "--image", "tiny", "--name", name, "--no-wait"];
        soon(&cloud, &[&args, site].concat())
    };
    create("here", &["--site", "center"]);
    for list in [["image", "list"], ["pool", "status"]] {
        let answer = soon(&cloud, &list);
        assert!(answer.stderr.contains("site 'cafe' does not answer"), "{answer:?}");
        assert!(answer.stdout.contains("center"), "{answer:?}");
    }
    within(SOON * 3, "the site to be known not to answer", || {
        let sites = cloud.ok(&["site", "list"]);
        let cafe = sites.as_array()?.iter().find(|s| s["name"] == "cafe")?.clone();
        (cafe["state"] == "unreachable").then_some(())
    });
    became(&sites, "cafe", "unreachable");
    create("anywhere", &[]);
    assert_eq!(cloud.vm("anywhere")["site"], "center");
    let words = cloud.refused(&["vm", "activate", "base", "--name", "there", "--site", "cafe"], 1);
    assert!(words.contains("does not answer"), "{words}");
    resume(ap);
    within(SOON * 6, "the site to be back", || {
        let answer = cloud.run(&["pool", "status"]);
        (answer.exit == 0 && answer.stdout.contains("cafe")).then_some(())
    });

    became(&sites, "cafe", "ready");
    became(&machines, "here", "running");

    // Whoever follows is cut off, and is told of nothing for a while.
    pause(machines.pid());
    // An AP serves its machines before it has found its center.
    cloud.kill(Daemon::Ap);
    cloud.kill(Daemon::Center);
    cloud.serves(Daemon::Ap);
    cloud.restart_center();
    cloud.wait_ap();

    // What happens meanwhile is told by a center that was started again since.
    let _ = cloud.ok(&["vm", "delete", "here"]);
    cloud.kill(Daemon::Center);
    cloud.restart_center();
    resume(machines.pid());
    within(SOON, "the end of 'here'", || {
        let events = story(&machines, "here");
        (events.last()?["deleted"] == true).then_some(())
    });
    assert_eq!(machines.interrupt(), 0);
}
