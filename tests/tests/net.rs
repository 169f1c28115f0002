//! A machine reaches the world, and gets there again after a move.
#![allow(clippy::unwrap_used)]

use std::process::Command;
use std::time::Duration;

use godwit_testkit::World;
use godwit_tests::{Cloud, Daemon, within};

/// How long a guest may take to have a new card up: emulated, that is seconds.
const CARD_WITHIN: Duration = Duration::from_secs(60);

/// Whether a machine fetches a page of the world's, once its card is up.
fn fetches(cloud: &Cloud, vm: &str, world: &World) {
    let line =
        format!("printf 'GET /hostname HTTP/1.0\\r\\n\\r\\n' | nc -w 3 {} 80", world.address);
    let what = format!("'{vm}' to reach the world");
    within(CARD_WITHIN, &what, || {
        cloud.guest(vm).try_sh(&line).filter(|page| page.contains("200 OK"))
    });
}

/// What the host lists: namespaces, or what is in one.
fn ip(args: &str) -> String {
    let out = Command::new("ip").args(args.split(' ')).output().unwrap();
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// The namespaces of a network.
fn namespaces(network: &serde_json::Value) -> Vec<String> {
    let id = network["id"].as_str().unwrap().replace('-', "");
    let all = ip("netns list");
    let ours = all.lines().filter(|l| l.contains(&id[20..]));
    ours.map(|l| l.split(' ').next().unwrap().to_owned()).collect()
}

fn taps(namespace: &str) -> usize {
    ip(&format!("-n {namespace} -o link show")).matches("master br0").count()
}

fn address(cloud: &Cloud, vm: &str) -> String {
    cloud.vm(vm)["network"]["address"].as_str().unwrap().to_owned()
}

#[test]
fn a_machine_reaches_the_world_and_again_after_a_move() {
    let world = World::new();
    let mut cloud = Cloud::start();
    let network = cloud.ok(&["network", "get", "default"]);
    assert_eq!((&network["kind"], &network["prefix"]), (&"nat".into(), &"10.80.0.0/24".into()));

    for name in ["a", "b"] {
        let image = ["vm", "create", "--image", "tiny", "--name", name];
        let _ = cloud.ok(&[&image[..], &["--network", "default", "--site", "center"]].concat());
    }
    let at = address(&cloud, "a");
    fetches(&cloud, "a", &world);
    fetches(&cloud, "b", &world);
    assert!(cloud.guest("a").sh("ip -4 addr show eth0").contains(&format!("{at}/24")));
    assert_eq!(cloud.guest("a").sh("hostname"), "a");
    assert!(cloud.guest("a").sh("cat /etc/resolv.conf").contains("nameserver 10.80.0.1"));
    let named = cloud.guest("a").sh("nslookup b.default.internal 10.80.0.1");
    assert!(named.contains(&address(&cloud, "b")), "{named}");
    let beside = format!("ping -c 1 -W 5 {}", address(&cloud, "b"));
    let _ = cloud.guest("a").sh(&beside);
    let words = cloud.refused(&["network", "delete", "default"], 5);
    assert!(words.contains("as long as its tenant"), "{words}");

    // A killed daemon's machines stay on the line, and the next daemon leaves them there.
    let [of_center] = &namespaces(&network)[..] else { panic!("one site has it") };
    cloud.kill(Daemon::Center);
    let pings = format!("netns exec {of_center} busybox ping -c 3 -W 5 {at}");
    assert!(ip(&pings).contains(" 0% packet loss"), "while no daemon runs");
    cloud.serves(Daemon::Center);
    cloud.wait_ap();
    fetches(&cloud, "a", &world);

    // It moves: the same address, another way out. Nothing of it stays.
    let mac = cloud.guest("a").sh("cat /sys/class/net/eth0/address");
    let _ = cloud.ok(&["vm", "migrate", "a", "--to", "cafe"]);
    cloud.runs_at("a", "cafe");
    fetches(&cloud, "a", &world);
    assert_eq!(cloud.guest("a").sh("cat /sys/class/net/eth0/address"), mac);
    assert_eq!(address(&cloud, "a"), at);
    assert_eq!((namespaces(&network).len(), taps(of_center)), (2, 1), "each site has one of them");

    // A stopped machine comes back to its address; a substrate's clone gets its own.
    let _ = cloud.ok(&["vm", "stop", "a", "--force"]);
    let _ = cloud.ok(&["vm", "start", "a"]);
    fetches(&cloud, "a", &world);
    let _ = cloud.ok(&["vm", "dock", "b", "--name", "lab"]);
    for name in ["c", "d"] {
        let clone = ["vm", "activate", "lab", "--name", name, "--network", "default"];
        let _ = cloud.ok(&[&clone[..], &["--site", "center"]].concat());
        fetches(&cloud, name, &world);
    }
    assert_ne!(address(&cloud, "c"), address(&cloud, "d"));
    // One whose card stayed in it when it was docked.
    let _ = cloud.ok(&["vm", "create", "--image", "tiny", "--name", "e", "--site", "center"]);
    let _ = cloud.ok(&["vm", "dock", "e", "--name", "plain"]);
    let clone = ["vm", "activate", "plain", "--name", "f", "--network", "default"];
    let _ = cloud.ok(&[&clone[..], &["--site", "center"]].concat());
    fetches(&cloud, "f", &world);
    assert!(cloud.guest("f").sh("ip -4 addr show").contains(&address(&cloud, "f")));

    for name in ["a", "c", "d", "f"] {
        let _ = cloud.ok(&["vm", "delete", name]);
    }
    assert_eq!(namespaces(&network), Vec::<String>::new(), "nothing is left");
}

#[test]
fn networks_are_made_used_up_and_removed() {
    let cloud = Cloud::center_only();
    let _ = cloud.ok(&["network", "create", "lab", "--kind", "private", "--prefix", "10.9.0.0/29"]);
    let words = cloud.refused(&["network", "create", "lab"], 5);
    assert!(words.contains("exists already"), "{words}");
    let listed = cloud.run(&["network", "list", "-o", "name"]).stdout;
    assert_eq!(listed, "default\nlab\n");
    let words = cloud.refused(&["vm", "create", "--image", "tiny", "--network", "none"], 4);
    assert!(words.contains("godwit network list"), "{words}");
    let image = ["vm", "create", "--image", "tiny", "--name", "a", "--network", "lab"];
    let _ = cloud.ok(&image);
    let words = cloud.refused(&["network", "delete", "lab"], 5);
    assert!(words.contains("in use by machine 'a'"), "{words}");
    let network = cloud.ok(&["network", "get", "lab"]);
    let namespace = &namespaces(&network)[0];
    assert!(!ip(&format!("-n {namespace} link show")).contains("up0"), "it leads nowhere");
    let _ = cloud.ok(&["vm", "delete", "a"]);
    let _ = cloud.ok(&["network", "delete", "lab"]);
    assert_eq!(namespaces(&network), Vec::<String>::new());
}
