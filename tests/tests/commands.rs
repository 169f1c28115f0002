//! What each command says and does, as a user meets it.
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use godwit_tests::{Cloud, Daemon, Setup, free_port, has_image, within};

#[test]
fn every_form_of_answer_and_each_refusal_is_clear() {
    let cloud = Cloud::center_only();
    cloud.bring_substrate();
    let _ = cloud.ok(&["vm", "activate", "base", "--name", "a"]);

    // Forms.
    let table = cloud.run(&["vm", "list"]).stdout;
    assert!(table.starts_with("NAME   STATE     SITE     IMAGE   MEMORY    AGE\n"), "{table}");
    assert!(table.lines().all(|l| l.len() <= 80), "{table}");
    let wide = cloud.run(&["vm", "list", "-o", "wide"]).stdout;
    assert!(wide.lines().next().unwrap().contains("GEN"), "{wide}");
    assert_eq!(cloud.run(&["vm", "list", "-o", "name"]).stdout, "a\n");
    assert!(cloud.run(&["vm", "get", "a", "-o", "yaml"]).stdout.contains("\nname: a\n"));
    let properties = cloud.run(&["substrate", "get", "base"]).stdout;
    assert!(properties.starts_with("name      base\n"), "{properties}");
    // Nothing is drawn where there is no terminal.
    let made = cloud.run(&["vm", "activate", "base", "--name", "b"]);
    assert!(made.stderr.is_empty() && made.stdout.starts_with("b   running at center"), "{made:?}");

    // A guest's program.
    let said = cloud.run(&["vm", "exec", "a", "--", "/bin/busybox", "echo", "here"]);
    assert_eq!((said.stdout.as_str(), said.stderr.as_str()), ("here\n", ""));
    let words = cloud.refused(&["vm", "exec", "a", "--", "/bin/false"], 1);
    assert_eq!(words, "error: the program ended with exit code 1\n");
    assert!(cloud.refused(&["vm", "exec", "a", "nothere"], 5).contains("nothere"));

    // This guest shows nothing.
    for verb in [&["vm", "screenshot", "a"][..], &["vm", "type", "a", "x"], &["vm", "view", "a"]] {
        let words = cloud.refused(verb, 5);
        assert!(words.contains("'a' has no display") && words.contains("hint: "), "{words}");
    }

    // Operations.
    let first = cloud.ok(&["op", "list"])[0]["id"].as_str().unwrap().to_owned();
    assert_eq!(cloud.ok(&["op", "wait", &first])["state"], "done");
    assert!(cloud.refused(&["op", "cancel", &first], 5).contains("done already"));
    let words = cloud.refused(&["op", "wait", "00000000-0000-7000-8000-000000000000"], 4);
    assert!(!words.contains("may go on"), "{words}");
    let _ = cloud.refused(&["op", "wait", "nonsense"], 2);

    // Tokens.
    assert!(cloud.refused(&["site", "token", "center"], 5).contains("own site"));
    for bad in ["0", "8d", "500ms"] {
        let _ = cloud.refused(&["site", "token", "bar", "--lifetime", bad], 2);
    }

    // What is refused says so, however much of it is sent.
    let archive = cloud.substrate_archive();
    let archive = archive.to_str().unwrap();
    for (args, exit, said) in [
        (&["--site", "nowhere"][..], 4, "nowhere"),
        (&["--name", "base"], 5, "exists already"),
        (&[], 5, "already"),
    ] {
        let words = cloud.refused(&[&["substrate", "import", archive], args].concat(), exit);
        assert!(words.contains(said), "{words}");
    }
    let _ = cloud.refused(&["substrate", "import", "/tmp"], 2);
    let _ = cloud.refused(&["substrate", "import", "/nowhere"], 2);
    // Under a name of its own it is a substrate of its own, made of the same units.
    let copy = cloud.ok(&["substrate", "import", archive, "--name", "copy"]);
    assert_eq!(copy["substrate"]["name"], "copy");
    assert_ne!(copy["substrate"]["id"], cloud.ok(&["substrate", "get", "base"])["id"]);
    let _ = cloud.ok(&["vm", "activate", "copy", "--name", "c"]);
    cloud.guest("c").intact(0);
    let words = cloud.refused(&["substrate", "delete", "copy"], 5);
    assert!(words.contains("in use by machine 'c'"), "{words}");
    let out = cloud.file("copy.gwsa");
    let _ = cloud.run_export("copy", &out);
    assert!(out.exists() && !out.with_extension("gwsa.part").exists());
    let _ =
        cloud.refused(&["substrate", "export", "nothing", cloud.file("x").to_str().unwrap()], 4);
    assert!(!cloud.file("x").exists() && !cloud.file("x.part").exists());

    // One JSON text, however many sites there are.
    let pools = cloud.ok(&["pool", "status"]);
    assert_eq!(pools[0]["substrates"], 2, "{pools}");
    let checks = cloud.ok(&["pool", "check"]);
    assert!(checks[0]["check"]["units"].as_u64().unwrap() > 0, "{checks}");
}

/// The pCPUs that each vCPU of a QEMU may run on, as the kernel lists them.
fn vcpu_places(qemu: i32) -> Vec<String> {
    let mut places = Vec::new();
    for task in std::fs::read_dir(format!("/proc/{qemu}/task")).unwrap().flatten() {
        // A thread that ends meanwhile is none of its vCPUs.
        let Ok(status) = std::fs::read_to_string(task.path().join("status")) else { continue };
        let field = |name: &str| status.lines().find_map(|l| l.strip_prefix(name)).map(str::trim);
        if field("Name:").is_some_and(|n| n.starts_with("CPU ")) {
            places.extend(field("Cpus_allowed_list:").map(str::to_owned));
        }
    }
    places
}

#[test]
fn a_guest_powers_itself_off_and_starts_again_with_its_disk() {
    let cloud = Setup::new().co_scheduling().center_only();
    let _ = cloud.ok(&["vm", "create", "--image", "tiny", "--name", "a", "--vcpus", "2"]);
    let guest = cloud.guest("a");
    guest.answers();
    // Its site keeps siblings on distinct pCPUs.
    let qemu = cloud.qemu(&cloud.vm("a"), Daemon::Center).unwrap();
    within(Duration::from_secs(20), "its vCPUs to be placed", || {
        let places = vcpu_places(qemu);
        let distinct = places.iter().collect::<std::collections::BTreeSet<_>>().len();
        (places.len() == 2 && distinct == 2).then_some(())
    });
    let _ = guest.sh("echo kept >/data/kept");
    let log = cloud.run(&["vm", "console", "a", "--tail", "4000"]).stdout;
    assert!(log.contains("godwit: ready"), "{log}");

    // Asked, it goes by itself: well before the power would be cut.
    let stopped = cloud.run(&["vm", "stop", "a"]);
    assert_eq!((stopped.exit, stopped.stdout.as_str()), (0, "a   stopped\n"), "{stopped:?}");
    assert!(stopped.took < Duration::from_secs(30), "{:?}", stopped.took);
    assert_eq!(cloud.run(&["vm", "stop", "a"]).exit, 3);
    let words = cloud.refused(&["vm", "exec", "a", "/bin/true"], 5);
    assert!(words.contains("does not run") && words.contains("godwit vm start a"), "{words}");
    let _ = cloud.refused(&["vm", "dock", "a"], 5);
    let _ = cloud.ok(&["vm", "start", "a"]);
    guest.answers();
    assert_eq!(guest.sh("cat /data/kept"), "kept");
    assert_eq!(cloud.run(&["vm", "start", "a"]).exit, 3);
    let _ = cloud.ok(&["vm", "stop", "a", "--force"]);
    let _ = cloud.ok(&["vm", "delete", "a"]);
    let _ = cloud.refused(&["vm", "get", "a"], 4);
}

#[test]
fn a_desktop_is_seen_typed_into_and_viewed() {
    if !has_image("abiword") {
        // It is built by those who want a desktop; the other tests need `tiny` only.
        return;
    }
    let cloud = Cloud::center_only();
    let _ = cloud.ok(&["vm", "create", "--image", "abiword", "--name", "desk"]);
    let shot = || {
        let file = cloud.file("shot.png");
        let a = cloud.run(&["vm", "screenshot", "desk", file.to_str().unwrap()]);
        assert_eq!(a.exit, 0, "{}", a.stderr);
        let png = std::fs::read(file).unwrap();
        assert!(png.starts_with(b"\x89PNG\r\n\x1a\n"), "no PNG");
        png
    };
    let before = shot();
    let _ = cloud.refused(&["vm", "type", "desk", "\u{fc}"], 2);
    let typed = cloud.run(&["vm", "type", "desk", "hello", "--enter"]);
    assert_eq!((typed.exit, typed.stdout.as_str()), (0, ""), "{}", typed.stderr);
    within(Duration::from_secs(60), "a changed screen", || (shot() != before).then_some(()));

    let _ = cloud.refused(&["vm", "view", "desk", "--listen", "0.0.0.0:0"], 2);
    let mut view = cloud.begin(&["vm", "view", "desk"]);
    let mut line = String::new();
    let mut said = std::io::BufReader::new(view.0.stdout.take().unwrap());
    std::io::BufRead::read_line(&mut said, &mut line).unwrap();
    let at = line.trim().strip_prefix("vnc://").expect("an address");
    // One viewer after the other.
    for _ in 0..2 {
        let mut viewer = TcpStream::connect(at).unwrap();
        viewer.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let mut hello = [0; 12];
        viewer.read_exact(&mut hello).unwrap();
        assert_eq!(&hello, b"RFB 003.008\n");
        viewer.write_all(&hello).unwrap();
        let mut kinds = [0; 1];
        viewer.read_exact(&mut kinds).unwrap();
        assert!(kinds[0] > 0, "the display refuses");
    }
    assert_eq!(cloud.qemu(&cloud.vm("desk"), Daemon::Ap), None);
}

/// `godwit up` and `down`, with directories and ports of their own.
#[test]
fn up_brings_a_center_and_an_ap_and_down_ends_them() {
    let cloud = Cloud::nothing();
    let root = cloud.root();
    let (api, link) = (free_port(), free_port());
    let (api, link) = (format!("127.0.0.1:{api}"), format!("127.0.0.1:{link}"));
    let up = ["up", "--root", root, "--api", &api, "--link", &link];

    let dry = cloud.run(&[&up[..], &["--dry-run", "--no-ap"]].concat());
    assert_eq!(dry.stdout, "would: start center\n");
    let _ = cloud.refused(&[&up[..], &["--ap", "center"]].concat(), 2);
    assert_eq!(cloud.run(&["down", "--root", root]).exit, 3);

    let a = cloud.run(&up);
    assert_eq!(a.exit, 0, "{}", a.stderr);
    let lines: Vec<&str> = a.stdout.lines().collect();
    assert!(lines[0].starts_with(&format!("center  ready   https://{api}")), "{}", a.stdout);
    assert!(lines[1].starts_with("cafe    joined  "), "{}", a.stdout);
    let sites = cloud.ok(&["site", "list"]);
    assert!(sites.as_array().unwrap().iter().all(|s| s["state"] == "ready"), "{sites}");
    assert!(sites[0]["report"]["rtt_ms"].as_f64().unwrap() > 0.0, "{sites}");
    assert_eq!(cloud.run(&up).exit, 3, "it is up already");

    let token = cloud.token("bar");
    let a = cloud.run(&["site", "join", &token, "--root", root]);
    assert_eq!(a.exit, 0, "{}", a.stderr);
    assert!(a.stderr.contains(&format!("godwit ap --name bar --root {root}")), "{}", a.stderr);
    assert_eq!(cloud.run(&["site", "join", &token, "--root", root]).exit, 3);
    let other = cloud.file("other");
    let words = cloud.refused(&["site", "join", &token, "--root", other.to_str().unwrap()], 1);
    assert!(words.contains("used before"), "{words}");

    let a = cloud.run(&["down", "--root", root]);
    assert_eq!((a.exit, a.stdout.as_str()), (0, "cafe    stopped\ncenter  stopped\n"));
    let words = cloud.refused(&["vm", "list"], 1);
    assert!(words.contains("godwit up"), "{words}");
    // What it was is there again after the next `up`.
    let a = cloud.run(&[&up[..], &["-o", "name"]].concat());
    assert_eq!((a.exit, a.stdout.as_str()), (0, "center\ncafe\n"), "{}", a.stderr);
    assert_eq!(cloud.run(&["down", "--root", root]).exit, 0);
}

#[test]
fn doctor_looks_at_this_machine() {
    let cloud = Cloud::nothing();
    let found = cloud.run(&["doctor", "-o", "json"]);
    let checks = found.json();
    let of = |name: &str| {
        let mut all = checks.as_array().unwrap().iter();
        all.find(|c| c["name"] == name).unwrap_or_else(|| panic!("{name}: {checks}")).clone()
    };
    for name in ["QEMU for x86-64", "accelerator", "userfaultfd", "memory directory"] {
        assert_ne!(of(name)["verdict"], "missing", "{checks}");
    }
    assert_eq!(found.exit, 0, "{}", found.stdout);
    let a = cloud.run(&["doctor", "--ram", "/var"]);
    assert_eq!(a.exit, 1);
    assert!(a.stdout.contains("MISSING") && a.stderr.contains("/dev/shm"), "{}", a.stdout);
}

#[test]
fn progress_is_drawn_on_a_terminal_and_the_console_is_left_by_its_key() {
    let cloud = Cloud::center_only();
    cloud.bring_substrate();
    let drawn = cloud.on_terminal("vm create --image tiny --name a", &[]);
    assert!(drawn.contains("boot") && drawn.contains("waiting for the guest"), "{drawn:?}");
    assert!(!drawn.contains('\u{2588}'), "a bar without its dress: {drawn:?}");
    assert!(drawn.trim_end().ends_with("a   running at center   from image tiny"), "{drawn:?}");
    cloud.guest("a").answers();

    let keys: [(&str, &[u8]); 3] =
        [("Ctrl-] leaves", b"\r"), ("/#", b"echo $((6*7))\r"), ("42", &[0x1d])];
    let drawn = cloud.on_terminal("vm console a", &keys);
    assert!(drawn.contains("console of a"), "{drawn:?}");
}
