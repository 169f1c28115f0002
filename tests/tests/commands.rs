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
    let answer = cloud.run(&["vm", "exec", "a", "--", "/bin/busybox", "echo", "here"]);
    assert_eq!((answer.stdout.as_str(), answer.stderr.as_str()), ("here\n", ""));
    // Its exit code is its own; a failure of Godwit's has words.
    for (line, exit, words) in [
        ("exit 42", 42, ""),
        ("echo no >&2; false", 1, "no\n"),
        ("kill -9 $$", 137, "the program was ended by signal 9\n"),
    ] {
        assert_eq!(cloud.refused(&["vm", "exec", "a", "--", "/bin/sh", "-c", line], exit), words);
    }
    assert!(cloud.refused(&["vm", "exec", "a", "nothere"], 5).contains("nothere"));

    // This guest shows nothing.
    let typed = "my-passphrase-7345";
    for verb in [&["vm", "screenshot", "a"][..], &["vm", "type", "a", typed], &["vm", "view", "a"]]
    {
        let words = cloud.refused(verb, 5);
        assert!(words.contains("'a' has no display") && words.contains("hint: "), "{words}");
    }
    // What was typed is in no log.
    let log = cloud.run(&["audit", "list", "--limit", "20"]).stdout;
    assert!(log.contains("vm type") && !log.contains(typed), "{log}");
    let log = cloud.log_text(Daemon::Center);
    assert!(log.contains("center ready") && !log.contains(typed), "{log}");

    // Operations.
    let first = cloud.ok(&["op", "list"])[0]["id"].as_str().unwrap().to_owned();
    assert_eq!(cloud.ok(&["op", "wait", &first])["state"], "done");
    assert!(cloud.refused(&["op", "cancel", &first], 5).contains("done already"));
    let words = cloud.refused(&["op", "wait", "00000000-0000-7000-8000-000000000000"], 4);
    assert!(!words.contains("may go on"), "{words}");
    let words = cloud.refused(&["op", "wait", "nonsense"], 2);
    assert!(words.contains("godwit op list"), "{words}");
    assert!(cloud.refused(&["vm", "list", "--site", "nowhere"], 4).contains("nowhere"));
    let words = cloud.refused(&["vm", "dock", "a", "--name", "base"], 5);
    assert!(words.contains("exists already") && words.contains("with --name"), "{words}");

    // Tokens.
    assert!(cloud.refused(&["site", "token", "center"], 5).contains("own site"));
    for bad in ["0", "8d", "500ms"] {
        let _ = cloud.refused(&["site", "token", "bar", "--lifetime", bad], 2);
    }

    // What is refused says so, however much of it is sent.
    let archive = cloud.substrate_archive();
    let archive = archive.to_str().unwrap();
    for (args, exit, expected) in [
        (&["--site", "nowhere"][..], 4, "nowhere"),
        (&["--name", "base"], 5, "exists already"),
        (&[], 5, "already"),
    ] {
        let words = cloud.refused(&[&["substrate", "import", archive], args].concat(), exit);
        assert!(words.contains(expected), "{words}");
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

/// The pid in words like "it still runs in the guest (pid 7)".
fn pid_in(words: &str) -> String {
    let at = words.find("(pid ").unwrap_or_else(|| panic!("no pid: {words}"));
    words[at + 5..].chars().take_while(char::is_ascii_digit).collect()
}

#[test]
fn a_program_is_followed_wherever_its_machine_goes() {
    let cloud = Cloud::start();
    cloud.bring_substrate();
    let _ = cloud.ok(&["vm", "activate", "base", "--name", "a", "--site", "center"]);
    let sh = |vm: &str, line: &str| cloud.run(&["vm", "exec", vm, "--", "/bin/sh", "-c", line]);

    // Any bytes, more than one message holds.
    let noise: Vec<u8> =
        (0..700_000_u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let back = cloud.feed(&["vm", "exec", "-i", "a", "--", "/bin/cat"], &noise);
    assert!(back.stdout == noise, "{} of {}: {}", back.stdout.len(), noise.len(), back.stderr);
    let much =
        cloud.feed(&["vm", "exec", "a", "--", "/bin/dd", "if=/dev/zero", "bs=1M", "count=12"], b"");
    assert_eq!((much.exit, much.stdout.len()), (0, 12 << 20), "{}", much.stderr);
    let long = vec![0; (16 << 20) + 1];
    let refused = cloud.feed(&["vm", "exec", "-i", "a", "--", "/bin/cat"], &long);
    assert!(refused.exit == 2 && refused.stderr.contains("16 MiB"), "{}", refused.stderr);

    // What runs until it is told to end.
    let waits = |until: &str, end: &str| {
        format!(
            "echo >/tmp/runs-{until}; while [ ! -e /tmp/{until} ]; do sleep 1; done; echo {end}"
        )
    };
    let runs = |until: &str| {
        within(Duration::from_secs(30), "the program to run", || {
            (sh("a", &format!("ls /tmp/runs-{until}")).exit == 0).then_some(())
        });
    };

    // One that takes its time keeps nobody waiting, is followed through a move, and passes its
    // exit code on.
    std::thread::scope(|scope| {
        let slow = scope.spawn(|| sh("a", &waits("moved", "slept; exit 7")));
        runs("moved");
        let beside = sh("a", "echo here");
        assert_eq!(beside.stdout, "here\n", "{}", beside.stderr);
        assert!(!slow.is_finished(), "it ended before it was told to");
        let _ = cloud.ok(&["vm", "migrate", "a", "--to", "cafe"]);
        assert_eq!(sh("a", "touch /tmp/moved").exit, 0);
        let slow = slow.join().unwrap();
        assert_eq!((slow.exit, slow.stdout.as_str()), (7, "slept\n"), "{}", slow.stderr);
        assert_eq!(slow.stderr, "");
    });
    // What it came from is not needed any more.
    let _ = cloud.ok(&["substrate", "delete", "base"]);
    let _ = cloud.guest("a").intact(0);

    let words = cloud.refused(
        &["vm", "exec", "a", "--within", "1", "--", "/bin/sh", "-c", "sleep 3; echo late"],
        124,
    );
    assert!(words.contains("has not ended within 1 s; it still runs in the guest"), "{words}");
    let late = cloud.run(&["vm", "exec", "a", "--pid", &pid_in(&words)]);
    assert_eq!((late.exit, late.stdout.as_str()), (0, "late\n"), "{}", late.stderr);
    let _ = cloud.refused(&["vm", "exec", "a", "--pid", &pid_in(&words)], 4);

    // Docked while it runs, it goes on in the clone.
    std::thread::scope(|scope| {
        let slow = scope.spawn(|| sh("a", &waits("docked", "woken; exit 3")));
        runs("docked");
        let docked = cloud.run(&["vm", "dock", "a", "--name", "asleep"]);
        assert_eq!(docked.exit, 0, "{}", docked.stderr);
        let slow = slow.join().unwrap();
        assert_eq!(slow.exit, 5, "{}", slow.stderr);
        assert!(slow.stderr.contains("docked as substrate 'asleep'"), "{}", slow.stderr);
        let _ = cloud.ok(&["vm", "activate", "asleep", "--name", "b"]);
        assert_eq!(sh("b", "touch /tmp/docked").exit, 0);
        let woken = cloud.run(&["vm", "exec", "b", "--pid", &pid_in(&slow.stderr)]);
        assert_eq!((woken.exit, woken.stdout.as_str()), (3, "woken\n"), "{}", woken.stderr);
    });
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
    let begun = std::time::Instant::now();
    let words = cloud.refused(&["vm", "exec", "a", "/bin/true"], 5);
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert!(words.contains("is stopped") && words.contains("godwit vm start a"), "{words}");
    let _ = cloud.refused(&["vm", "dock", "a"], 5);
    let _ = cloud.ok(&["vm", "start", "a"]);
    guest.answers();
    assert_eq!(guest.sh("cat /data/kept"), "kept");
    assert_eq!(cloud.run(&["vm", "start", "a"]).exit, 3);

    // While its owner is busy, and while its guest is waited for, it can be looked at.
    for step in ["owner.power-off", "stop.asking"] {
        cloud.hold(step);
    }
    let _stop = cloud.begin(&["vm", "stop", "a"]);
    for step in ["owner.power-off", "stop.asking"] {
        let _ = cloud.held(step);
        let log = cloud.run(&["vm", "console", "a", "--tail", "4000"]);
        assert!(log.exit == 0 && log.took < Duration::from_secs(5), "{step}: {:?}", log.took);
        let all = cloud.ok(&["site", "list"]);
        assert_eq!(all[0]["state"], "ready", "{step}");
        assert_eq!(cloud.vm("a")["state"], "running", "{step}");
        assert_eq!(cloud.ok(&["vm", "list"])[0]["state"], "running", "{step}");
        cloud.let_go(step);
    }
    within(Duration::from_secs(60), "it to be stopped", || {
        (cloud.vm("a")["state"] == "stopped").then_some(())
    });
    let _ = cloud.ok(&["vm", "delete", "a"]);
    let _ = cloud.refused(&["vm", "get", "a"], 4);
}

#[test]
fn a_desktop_is_seen_typed_into_and_viewed() {
    const TYPED: &str = "hello7345";
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
    let typed = cloud.run(&["vm", "type", "desk", TYPED, "--enter"]);
    assert_eq!((typed.exit, typed.stdout.as_str()), (0, ""), "{}", typed.stderr);
    within(Duration::from_secs(60), "a changed screen", || (shot() != before).then_some(()));
    // It is in the guest, and neither in the audit log nor in what the daemon says.
    let log = cloud.ok(&["audit", "list"]).to_string();
    assert!(log.contains("vm type") && !log.contains(TYPED), "{log}");
    assert!(!cloud.log_text(Daemon::Center).contains(TYPED));

    let _ = cloud.refused(&["vm", "view", "desk", "--listen", "0.0.0.0:0"], 2);
    let mut view = cloud.begin(&["vm", "view", "desk"]);
    let mut line = String::new();
    let mut reader = std::io::BufReader::new(view.0.stdout.take().unwrap());
    std::io::BufRead::read_line(&mut reader, &mut line).unwrap();
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

    // A lease of before does not count: when it says that it is up, it is.
    let center = std::fs::read_to_string(format!("{root}/center/run/daemon.pid")).unwrap();
    let center = rustix::process::Pid::from_raw(center.trim().parse().unwrap()).unwrap();
    rustix::process::kill_process(center, rustix::process::Signal::KILL).unwrap();
    let a = cloud.run(&up);
    assert_eq!(a.exit, 0, "{}", a.stderr);
    let _ = cloud.ok(&["image", "list", "--site", "cafe"]);

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
    // One that was thrown out never comes.
    let _ = cloud.run(&["site", "revoke", "cafe"]);
    let a = cloud.run(&up);
    assert_eq!(a.exit, 5, "{}", a.stderr);
    assert!(
        a.stderr.contains("'cafe' was revoked") && a.stderr.contains("--no-ap"),
        "{}",
        a.stderr
    );
    assert!(a.took < Duration::from_secs(20), "{:?}", a.took);
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
    // A list that is kept up to date, until Ctrl-C.
    let drawn = cloud.on_terminal("vm list --watch", &[("center", b"\x03".as_slice())]);
    assert!(drawn.contains("\x1b[HNAME   STATE"), "{drawn:?}");

    let keys: [(&str, &[u8]); 3] =
        [("Ctrl-] leaves", b"\r"), ("/#", b"echo $((6*7))\r"), ("42", &[0x1d])];
    let drawn = cloud.on_terminal("vm console a", &keys);
    assert!(drawn.contains("console of a"), "{drawn:?}");
}
