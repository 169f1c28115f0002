//! The command against a center of its own, in directories of its own.
#![allow(clippy::unwrap_used)]

use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use godwit_testkit::{EndsGuests, MemoryOf};
use serde_json::Value;

/// How long a center may take to be ready on a busy machine: it probes accelerators.
const READY_WITHIN: Duration = Duration::from_secs(240);

/// The certificate of no center.
const OTHER_CA: &str = "\
-----BEGIN CERTIFICATE-----
MIIBejCCASGgAwIBAgIUKa6k6nDRVWZDcOM91RWFWQ1z/UkwCgYIKoZIzj0EAwIw
EjEQMA4GA1UEAwwHYW5vdGhlcjAgFw0yNjExMjkxOTM1NTZaGA8yMTI2MTEwNTE5
MzU1NlowEjEQMA4GA1UEAwwHYW5vdGhlcjBZMBMGByqGSM49AgEGCCqGSM49AwEH
A0IABOcbAD6uh5ovpVgSwRvJowcD4l5PH2cz56m/pAR9zcWiT4Po3HZBkCvykQ4+
enJhwsrRsSJMXAnHyzaA6aRnUZKjUzBRMB0GA1UdDgQWBBSauvTOpHUFc1D6QXta
yQim5jJOlDAfBgNVHSMEGDAWgBSauvTOpHUFc1D6QXtayQim5jJOlDAPBgNVHRMB
Af8EBTADAQH/MAoGCCqGSM49BAMCA0cAMEQCIFGavmQ58Kw3bxsD1deOzVKYxxdU
bEOTeDtrC7rQotQhAiBZAyTwD3k3olpATy0Dd3B/wUJJ4x8BX0arK4+jf/B0jw==
-----END CERTIFICATE-----
";

/// Where the tests find images.
const IMAGES: &str = "/var/cache/godwit/images";

struct Center {
    child: Child,
    /// Machines outlive their daemon.
    _guests: EndsGuests,
    _memory: MemoryOf,
    dir: tempfile::TempDir,
}

impl Center {
    fn start() -> Self {
        let dir = tempfile::Builder::new().prefix("gwc").tempdir_in("/dev/shm").expect("dir");
        let socket = dir.path().join("n");
        let receiver = UnixDatagram::bind(&socket).expect("bind");
        receiver.set_read_timeout(Some(Duration::from_millis(500))).expect("time-out");
        let log = std::fs::File::create(dir.path().join("log")).expect("log");
        let images = dir.path().join("images");
        if Path::new(IMAGES).join("tiny").exists() {
            // Images of its own: what is deleted here is needed elsewhere.
            std::fs::create_dir(&images).expect("images");
            // The image alone: others may be built on this machine, too.
            let image = std::fs::read_link(format!("{IMAGES}/tiny")).expect("a link");
            std::fs::create_dir(images.join("by-hash")).expect("a directory");
            let copied = Command::new("cp")
                .args(["-a", "--sparse=always", "--parents"])
                .args([Path::new("tiny"), &image])
                .arg(&images)
                .current_dir(IMAGES)
                .status()
                .expect("cp");
            assert!(copied.success());
        }
        let mut child = Command::new(env!("CARGO_BIN_EXE_godwit"))
            .arg("center")
            .arg("--images")
            .arg(&images)
            .args(["--api", "127.0.0.1:0", "--link", "127.0.0.1:0", "--no-co-scheduling"])
            .arg("--root")
            .arg(dir.path().join("r"))
            .arg("--config")
            .arg(dir.path().join("config"))
            .env("NOTIFY_SOCKET", &socket)
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("spawn");
        let begun = Instant::now();
        let mut word = [0u8; 64];
        loop {
            if let Ok(n) = receiver.recv(&mut word) {
                assert_eq!(&word[..n], b"READY=1");
                let _memory = MemoryOf::root(&dir.path().join("r"));
                return Self { child, _guests: EndsGuests::of(dir.path()), _memory, dir };
            }
            let ended = child.try_wait().expect("wait");
            if ended.is_some() || begun.elapsed() > READY_WITHIN {
                let log = std::fs::read_to_string(dir.path().join("log")).expect("log");
                let _ = child.kill();
                panic!("the center is not ready ({ended:?}):\n{log}");
            }
        }
    }

    fn command(&self, line: &str) -> Command {
        let mut c = Command::new(env!("CARGO_BIN_EXE_godwit"));
        c.args(line.split(' ')).stdin(Stdio::null());
        c.env("GODWIT_CONFIG", self.dir.path().join("config"));
        for unset in
            ["GODWIT_API", "GODWIT_TOKEN", "GODWIT_TOKEN_FILE", "GODWIT_CA", "GODWIT_TENANT"]
        {
            c.env_remove(unset);
        }
        c
    }

    fn run(&self, line: &str) -> Output {
        self.command(line).output().expect("run")
    }

    fn json(&self, line: &str) -> Value {
        let out = self.run(&format!("{line} -o json"));
        let stderr = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "godwit {line}: {stderr}");
        serde_json::from_slice(&out.stdout).expect("json")
    }

    fn refused(&self, line: &str) -> (i32, String) {
        let out = self.run(line);
        assert!(out.stdout.is_empty(), "{line}");
        (out.status.code().expect("code"), String::from_utf8_lossy(&out.stderr).into_owned())
    }
}

impl Drop for Center {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        // One that a test has stopped hears of it only then.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::CONT);
        let _ = self.child.wait();
    }
}

#[test]
fn a_center_is_asked_and_refuses_in_clear_words() {
    let center = Center::start();

    let sites = center.json("site list");
    assert_eq!(sites[0]["name"], "center");
    assert_eq!(sites[0]["state"], "ready");
    assert_eq!(String::from_utf8_lossy(&center.run("site list -o name").stdout), "center\n");
    let table = String::from_utf8(center.run("site list").stdout).expect("text");
    assert!(table.starts_with("NAME     KIND     STATE   VMS"), "{table}");

    let images = center.json("image list");
    let mut known = images.as_array().expect("list").iter().map(|i| &i["name"]);
    assert!(known.any(|n| *n == "tiny"), "{images}");

    let token = center.json("site token cafe");
    assert!(token["token"].as_str().expect("text").starts_with("gwj1/"));

    let (exit, words) = center.refused("vm get nobody");
    assert_eq!(exit, 4, "{words}");
    assert!(words.contains("nobody") && words.contains("hint: "), "{words}");
    let (exit, words) = center.refused("vm create --image tiny --site nowhere");
    assert!([4, 5].contains(&exit), "{exit}: {words}");
    assert_eq!(center.refused("vm create --image ../etc").0, 2);
    assert_eq!(center.refused("op wait 00000000-0000-7000-8000-000000000000").0, 4);

    let token = "0123456789abcdef0123456789abcdef";
    let wrong = center.command("vm list").env("GODWIT_TOKEN", token).output().expect("run");
    assert_eq!(wrong.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("operator token"));
    let (exit, words) = center.refused("vm list --token-file /nowhere");
    assert_eq!(exit, 1);
    assert!(words.contains("no operator token") && words.contains("GODWIT_TOKEN"), "{words}");

    let (exit, words) = {
        let root = center.dir.path().join("r");
        let line = format!("center --api 127.0.0.1:0 --link 127.0.0.1:0 --root {}", root.display());
        center.refused(&line)
    };
    assert_eq!(exit, 5, "a second daemon of a site is refused: {words}");

    let (exit, words) = center.refused("vm list --token-file /tmp");
    assert_eq!((exit, words.contains("/tmp is a directory")), (1, true), "{words}");
    // A bit of the token file turned over is no wrong token; SIGHUP is no reason to end.
    let token = std::fs::read(center.dir.path().join("config/token")).expect("the token");
    let flipped = center.dir.path().join("flipped");
    std::fs::copy(center.dir.path().join("config/token"), &flipped).expect("copied");
    let other = [&token[..20], &[token[20] ^ 1], &token[21..]].concat();
    std::fs::write(&flipped, other).expect("flipped");
    let (_, words) = center.refused(&format!("vm list --token-file {}", flipped.display()));
    assert!(words.contains("is damaged") && !words.contains("no operator token"), "{words}");
    let pid = center.child.id().to_string();
    assert!(Command::new("kill").args(["-HUP", &pid]).status().expect("kill").success());
    let log = || std::fs::read_to_string(center.dir.path().join("log")).expect("log");
    let begun = Instant::now();
    while !log().contains("SIGHUP: ") {
        assert!(begun.elapsed() < READY_WITHIN, "{}", log());
        std::thread::sleep(Duration::from_millis(20));
    }
    center.json("vm list");
    let other = center.dir.path().join("other.pem");
    std::fs::write(&other, OTHER_CA).expect("write");
    let (exit, words) = center.refused(&format!("vm list --ca {}", other.display()));
    assert_eq!(exit, 1);
    assert!(words.contains("is not the one in") && words.contains("--ca"), "{words}");
    assert_eq!(center.refused("vm list --site nowhere").0, 4);
    let (exit, words) = center.refused("image inspect nope");
    assert!(exit == 4 && !words.contains("image build nope"), "{words}");

    // One that hangs is waited for as long as was said, and its images are not this machine's.
    let pid = rustix::process::Pid::from_child(&center.child);
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).expect("stop");
    // Its threads run on until the kernel has come to each.
    rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::UNTRACED).expect("stopped");
    let begun = Instant::now();
    let (exit, words) = center.refused("vm delete nobody --timeout 1s");
    assert_eq!((exit, words.contains("not answered in time")), (124, true), "{words}");
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    let (exit, words) = center.refused("image list");
    assert_eq!((exit, words.contains("--local")), (1, true), "{words}");
    let local = center.run("image list --local -o name");
    assert!(local.status.success() && local.stderr.is_empty(), "{local:?}");
    rustix::process::kill_process(pid, rustix::process::Signal::CONT).expect("continue");
    tenants_and_their_users(&center);
}

fn tenants_and_their_users(center: &Center) {
    let as_user = |token: &str, line: &str| {
        let out = center.command(line).env("GODWIT_TOKEN", token).output().expect("run");
        let words = String::from_utf8_lossy(&out.stderr).into_owned();
        (out.status.code().expect("code"), String::from_utf8(out.stdout).expect("text"), words)
    };
    let token = |line: &str| {
        let made = center.json(&format!("token create {line}"));
        (made["token"].as_str().expect("text").to_owned(), made["id"].as_str().unwrap().to_owned())
    };
    center.json("tenant create acme");
    assert_eq!(center.refused("tenant create acme").0, 5);
    center.json("user create ann --role admin --tenant acme");
    center.json("user create bob --role viewer --tenant acme");
    assert_eq!(center.refused("user create eve --tenant nobody").0, 4);
    let (ann, _) = token("--user ann --tenant acme");
    let (bob, id) = token("--user bob --tenant acme --lifetime 1h");
    let listed = String::from_utf8(center.run("token list").stdout).expect("text");
    assert!(listed.contains(&id) && !listed.contains(&bob), "{listed}");
    let wide = String::from_utf8(center.run("token list -o wide").stdout).expect("text");
    assert!(wide.lines().any(|l| l.contains("bob") && l.ends_with("operator")), "{wide}");
    // What is not one's own is not there; what is one's own is not for everybody.
    let (exit, out, _) = as_user(&ann, "tenant list -o name");
    assert_eq!((exit, out.as_str()), (0, "acme\n"));
    let (exit, out, words) = as_user(&bob, "user list -o name");
    assert_eq!((exit, out.as_str()), (0, "acme/ann\nacme/bob\n"), "{words}");
    for (who, line, want, expected) in [
        (&ann, "vm list --tenant default", 4, "no tenant 'default'"),
        (&ann, "site revoke center", 1, "may not change or remove sites"),
        (&ann, "user create root --role operator", 1, "may not make such users"),
        (&bob, "vm create --image tiny", 1, "may not make machines"),
        (&bob, "quota set acme --machines none --vcpus 9", 1, "may not change or remove tenants"),
        (&bob, "audit list", 1, "may not see the audit log"),
    ] {
        let (exit, _, words) = as_user(who, line);
        assert_eq!((exit, words.contains(expected)), (want, true), "{line}: {words}");
    }
    // A quota of no machine leaves room for none.
    center.json("quota set acme --machines 0 --memory 8G");
    assert_eq!(center.run("quota set acme --machines 0").status.code(), Some(3));
    let (exit, out, words) = as_user(&bob, "quota get acme");
    assert!(exit == 0 && out.contains("0 of 0") && out.contains("of 8.0 GiB"), "{out}{words}");
    if center.dir.path().join("images/tiny").exists() {
        let (exit, _, words) = as_user(&ann, "vm create --image tiny");
        assert_eq!((exit, words.contains("may have 0")), (5, true), "{words}");
    }
    // A token that was taken back is good for nothing, root gets one without any.
    center.json(&format!("token delete {id}"));
    let (exit, _, words) = as_user(&bob, "vm list");
    assert_eq!((exit, words.contains("token")), (1, true), "{words}");
    let socket = center.dir.path().join("r/center/run/admin.sock");
    let local =
        center.json(&format!("token create --local --role viewer --socket {}", socket.display()));
    let (exit, _, words) = as_user(local["token"].as_str().expect("text"), "vm list");
    assert_eq!(exit, 0, "{words}");
    let end = center.json("audit verify");
    let all = center.json("audit list --limit 1000");
    assert_eq!(end["entries"].as_u64().map(|n| n as usize), all.as_array().map(Vec::len), "{all}");
    let text = all.to_string();
    assert!(text.contains("tenant create") && text.contains("forbidden"), "{text}");
    assert!(!text.contains(&ann[30..60]), "{text}");
    assert_eq!(center.refused("tenant delete acme").0, 5);
    for user in ["ann", "bob"] {
        center.json(&format!("user delete acme/{user}"));
    }
    center.json("tenant delete acme");
    assert_eq!(as_user(&ann, "vm list").0, 1);
}

#[test]
fn a_machine_is_made_shown_and_deleted() {
    if !Path::new(IMAGES).join("tiny").exists() {
        return;
    }
    let center = Center::start();
    let made = center.json("vm create --image tiny --name one");
    assert_eq!(made["vm"]["name"], "one");
    assert_eq!(center.json("vm get one")["state"], "running");
    assert_eq!(center.run("vm start one").status.code(), Some(3), "it runs already");
    assert_eq!(center.json("vm list")[0]["name"], "one");
    let (exit, words) = center.refused("image delete tiny");
    assert_eq!((exit, words.contains("in use by machine 'one'")), (5, true), "{words}");
    center.json("vm delete one");
    assert_eq!(center.json("image delete tiny --dry-run")["dry_run"], true);
    center.json("image delete tiny");
    let images = center.json("image list");
    let tiny = images.as_array().expect("list").iter().find(|i| i["name"] == "tiny");
    assert_eq!(tiny.map(|i| &i["built"]), Some(&Value::Bool(false)), "{images}");
    let left = std::fs::read_dir(center.dir.path().join("images/by-hash")).expect("dir").count();
    assert_eq!(left, 0, "its files are still there");
    assert_eq!(center.refused("image delete tiny").0, 4);
    assert_eq!(center.refused("vm create --image tiny --name two").0, 5);
    assert_eq!(center.refused("vm get one").0, 4);
    assert_eq!(center.json("op list").as_array().expect("list").len(), 2);
}

#[test]
fn without_a_center_the_way_out_is_named() {
    let dir = tempfile::tempdir().expect("dir");
    let images: PathBuf = dir.path().join("images");
    let run = |line: &str| {
        Command::new(env!("CARGO_BIN_EXE_godwit"))
            .args(line.split(' '))
            .env("GODWIT_CONFIG", dir.path())
            .env("GODWIT_IMAGES", &images)
            .env_remove("GODWIT_API")
            .env_remove("GODWIT_TOKEN")
            .output()
            .expect("run")
    };
    let out = run("vm list");
    assert_eq!(out.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&out.stderr).contains("godwit up"));
    let out = run("image list -o name");
    assert!(out.status.success());
    assert!(String::from_utf8_lossy(&out.stderr).contains("no center is up"), "{out:?}");
    assert!(String::from_utf8_lossy(&out.stdout).lines().any(|l| l == "tiny"));
    let out = run("image inspect nope");
    let words = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(4), "{words}");
    assert!(!words.contains("image build nope") && words.contains("godwit image list"), "{words}");
    assert_eq!(run("image delete tiny --local").status.code(), Some(5));
    assert_eq!(run("image delete tiny --local --force").status.code(), Some(4));
    let out = run("image build no-such-recipe");
    assert_eq!(out.status.code(), Some(4), "{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!(run("vm").status.code(), Some(2));
}
