//! A port of a site's host leads to a machine, and goes with it.
#![allow(clippy::unwrap_used)]

use std::process::Command;
use std::time::Duration;

use godwit_testkit::World;
use godwit_tests::{Cloud, Daemon, Setup, free_port, within};

/// How long an emulated guest may take until what it serves is there.
const SERVES_WITHIN: Duration = Duration::from_secs(60);
/// How long rules may take to follow.
const FOLLOWS_WITHIN: Duration = Duration::from_secs(20);

/// Has a machine serve a page with its name.
fn serve(cloud: &Cloud, vm: &str) {
    let guest = cloud.guest(vm);
    let _ = guest.sh(&format!(
        "mkdir -p /www && echo 'this is {vm}' >/www/index.html && busybox httpd -p 80 -h /www"
    ));
}

fn reached(world: &World, port: u16, vm: &str) {
    let what = format!("'{vm}' to be reached at {port}");
    let page = format!("this is {vm}\n");
    within(SERVES_WITHIN, &what, || world.fetches(port).filter(|p| *p == page));
}

fn closed(world: &World, port: u16) {
    let what = format!("port {port} to be closed");
    within(FOLLOWS_WITHIN, &what, || world.fetches(port).is_none().then_some(()));
}

fn nft(args: &[&str]) -> String {
    let out = Command::new("nft").args(args).output().unwrap();
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// The tables of the host that lead `port` on: those of the sites at which it is open.
fn tables(port: u16) -> Vec<String> {
    let all = nft(&["list", "tables", "inet"]);
    let names = all.lines().filter_map(|l| l.strip_prefix("table inet "));
    let leads = |name: &&str| {
        let rule = format!("tcp dport {port} dnat");
        name.ends_with("_ports") && nft(&["list", "table", "inet", name]).contains(&rule)
    };
    names.filter(leads).map(str::to_owned).collect()
}

#[test]
fn a_published_port_goes_with_its_machine() {
    let world = World::new();
    let mut cloud = Cloud::start();
    for name in ["web", "other"] {
        let image = ["vm", "create", "--image", "tiny", "--name", name];
        let _ = cloud.ok(&[&image[..], &["--network", "default", "--site", "center"]].concat());
        serve(&cloud, name);
    }
    let (port, second) = (free_port(), free_port());
    let (mapped, at) = (format!("{port}:80/tcp"), format!("{port}/tcp"));
    assert_eq!(world.fetches(port), None);
    let answer = cloud.ok(&["vm", "publish", "web", &mapped]);
    let shown = serde_json::json!([{ "host": port, "guest": 80, "protocol": "tcp" }]);
    assert_eq!((&answer["published"], answer.get("ports_pending")), (&shown, None));
    assert_eq!(cloud.vm("web")["published"], shown);
    assert!(cloud.run(&["vm", "get", "web", "-o", "table"]).stdout.contains(&mapped));
    // It is there with the answer, while the network is.
    assert_eq!(world.fetches(port).as_deref(), Some("this is web\n"));

    // What is taken is refused, whoever has it.
    for vm in ["web", "other"] {
        let words = cloud.refused(&["vm", "publish", vm, &mapped], 5);
        assert!(
            words.contains(&format!("port {at} is published already, by machine 'web'")),
            "{words}"
        );
    }
    let program = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
    let used = program.local_addr().unwrap().port();
    let words = cloud.refused(&["vm", "publish", "other", &format!("{used}:80/tcp")], 5);
    assert!(words.contains("is in use there by another program"), "{words}");
    assert_eq!(cloud.vm("other").get("published"), None, "nothing of it is left");
    let words = cloud.refused(&["vm", "publish", "other", "80:80/tcp"], 5);
    assert!(words.contains("it has 1024 to 65535"), "{words}");
    let words = cloud.refused(&["vm", "unpublish", "other", &at], 4);
    assert!(words.contains("godwit vm get"), "{words}");
    let _ = cloud.refused(&["vm", "publish", "other", "0:80/tcp"], 2);
    // Nobody else on the host takes it meanwhile.
    assert!(std::net::TcpListener::bind(("0.0.0.0", port)).is_err());
    let _ = cloud.ok(&["vm", "publish", "other", &format!("{second}:80/tcp")]);
    reached(&world, second, "other");
    let _ = cloud.ok(&["vm", "unpublish", "other", &format!("{second}/tcp")]);
    assert_eq!(world.fetches(second), None);

    // A killed daemon's ports stay as they are, and the next daemon leaves them so.
    cloud.kill(Daemon::Center);
    reached(&world, port, "web");
    cloud.serves(Daemon::Center);
    cloud.wait_ap();
    reached(&world, port, "web");

    // It moves: the port is open there, and there alone.
    let before = tables(port);
    assert_eq!(before.len(), 1, "{before:?}");
    let _ = cloud.ok(&["vm", "migrate", "web", "--to", "cafe"]);
    cloud.runs_at("web", "cafe");
    reached(&world, port, "web");
    let after = within(FOLLOWS_WITHIN, "the source to close it", || {
        Some(tables(port)).filter(|t| t.len() == 1 && *t != before)
    });
    reached(&world, port, "web");
    cloud.kill(Daemon::Ap);
    reached(&world, port, "web");
    cloud.serves(Daemon::Ap);
    cloud.wait_ap();

    // Off, it is closed, and open when it runs again.
    let _ = cloud.ok(&["vm", "stop", "web", "--force"]);
    closed(&world, port);
    within(FOLLOWS_WITHIN, "the rule to go", || tables(port).is_empty().then_some(()));
    assert_eq!(cloud.vm("web")["published"], shown, "it keeps its port");
    let _ = cloud.ok(&["vm", "start", "web"]);
    serve(&cloud, "web");
    reached(&world, port, "web");
    assert_eq!(tables(port), after);

    // Gone with it, and free for the next.
    let _ = cloud.ok(&["vm", "delete", "web"]);
    closed(&world, port);
    let _ = cloud.ok(&["vm", "publish", "other", &mapped]);
    reached(&world, port, "other");
    let _ = cloud.ok(&["vm", "delete", "other"]);
    closed(&world, port);
}

#[test]
fn only_machines_behind_nat_publish() {
    let cloud = Cloud::center_only();
    let _ = cloud.ok(&["network", "create", "lab", "--kind", "private", "--prefix", "10.9.0.0/29"]);
    let image = ["vm", "create", "--image", "tiny", "--name"];
    let _ = cloud.ok(&[&image[..], &["a", "--network", "lab"]].concat());
    let _ = cloud.ok(&[&image[..], &["b"]].concat());
    for vm in ["a", "b"] {
        let words = cloud.refused(&["vm", "publish", vm, "8080:80/tcp"], 5);
        assert!(words.contains("is in no network of kind nat"), "{words}");
    }
}

#[test]
fn a_machine_stays_where_its_ports_are() {
    let world = World::new();
    let cloud = Setup::new().flag(Daemon::Ap, "--publish-ports=20000-20001").start();
    let image = ["vm", "create", "--image", "tiny", "--name", "web"];
    let _ = cloud.ok(&[&image[..], &["--network", "default", "--site", "center"]].concat());
    serve(&cloud, "web");
    let port = free_port();
    let _ = cloud.ok(&["vm", "publish", "web", &format!("{port}:80/tcp")]);
    reached(&world, port, "web");
    let words = cloud.refused(&["vm", "migrate", "web", "--to", "cafe"], 5);
    assert!(words.contains("site 'cafe' publishes: it has 20000 to 20001"), "{words}");
    cloud.runs_at("web", "center");
    reached(&world, port, "web");
    // Without them it goes.
    let _ = cloud.ok(&["vm", "unpublish", "web", &format!("{port}/tcp")]);
    let _ = cloud.ok(&["vm", "migrate", "web", "--to", "cafe"]);
    cloud.runs_at("web", "cafe");
    let _ = cloud.refused(&["vm", "publish", "web", &format!("{port}:80/tcp")], 5);
    let _ = cloud.ok(&["vm", "publish", "web", "20001:80/tcp"]);
    reached(&world, 20001, "web");
}
