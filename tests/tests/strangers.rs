//! Who may not, or not any more: strangers, revoked sites, old tokens, older generations.
#![allow(clippy::unwrap_used)]

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use godwit_tests::{Cloud, Daemon, Setup, free_port, within};
use godwit_transfer::keys::PendingIdentity;
use godwit_transfer::{Authority, Endpoint, EndpointOptions, Identity, Peer, Revocations, Trust};
use godwit_types::{Name, SiteKind};
use serde_json::Value;

/// How long a daemon may take to try its center and to be told.
const LOGGED_WITHIN: Duration = Duration::from_secs(60);

fn site(cloud: &Cloud, name: &str) -> Option<Value> {
    let sites = cloud.ok(&["site", "list"]);
    sites.as_array().unwrap().iter().find(|s| s["name"] == name).cloned()
}

/// Waits until a daemon, started as it is now, has been refused with these words and the center
/// has logged that.
fn turned_away(cloud: &Cloud, words: &str) {
    let (ap, center) = (cloud.log_text(Daemon::Ap).len(), cloud.log_text(Daemon::Center).len());
    let _daemon = cloud.start_unwanted(Daemon::Ap);
    within(LOGGED_WITHIN, &format!("the AP to be told {words:?}"), || {
        cloud.log_text(Daemon::Ap)[ap..].contains(words).then_some(())
    });
    within(LOGGED_WITHIN, "the center to log it", || {
        cloud.log_text(Daemon::Center)[center..].contains("refused a link").then_some(())
    });
}

fn tokens(cloud: &Cloud) -> Vec<(String, String, String)> {
    let all = cloud.ok(&["site", "token", "list"]);
    let text = |t: &Value, k: &str| t[k].as_str().unwrap().to_owned();
    let mut all: Vec<_> = all
        .as_array()
        .unwrap()
        .iter()
        .map(|t| (text(t, "site"), text(t, "state"), text(t, "id")))
        .collect();
    all.sort();
    all
}

#[test]
fn a_revoked_site_is_cut_off_and_comes_back_only_with_a_new_token() {
    let port = free_port();
    let mut cloud = Setup::new().flag(Daemon::Ap, &format!("--api=127.0.0.1:{port}")).start();
    // The AP serves the center's API: a user asks there as at the center.
    let _ = cloud.ok(&["user", "create", "ann", "--role", "member"]);
    let made = cloud.ok(&["token", "create", "--user", "ann"]);
    let file = |name: &str, token: &str| {
        let file = cloud.file(name);
        std::fs::write(&file, token).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
        file.to_str().unwrap().to_owned()
    };
    let ann = file("ann.token", made["token"].as_str().unwrap());
    let ann = ["--token-file", ann.as_str()];
    let (url, ca) = (format!("https://127.0.0.1:{port}"), cloud.site_dir(Daemon::Ap));
    let ca = ca.join("data/keys/api/api.pem").to_str().unwrap().to_owned();
    let there = ["--api", url.as_str(), "--ca", ca.as_str()];
    let ok = |args: &[&str]| cloud.ok(&[args, &there, &ann].concat());
    let _ = ok(&["vm", "create", "--image", "tiny", "--name", "far", "--site", "cafe"]);
    assert_eq!(ok(&["vm", "list"]), cloud.ok(&[&["vm", "list"][..], &ann].concat()));
    assert_eq!(ok(&["vm", "list"]).as_array().unwrap().len(), 1);
    // Not the operator, whose token the AP would see.
    let words = cloud.refused(&[&["vm", "list"][..], &there].concat(), 1);
    assert!(words.contains("operators are not heard by way of site 'cafe'"), "{words}");
    let log = cloud.ok(&["audit", "list"]);
    let made = log.as_array().unwrap().iter().filter(|e| e["action"] == "vm create");
    let made: Vec<_> = made.map(|e| (&e["user"], &e["by"])).collect();
    assert_eq!(made, [(&"ann".into(), &"cafe".into()); 2], "{log}");
    let unknown = file("unknown.token", "a-token-of-nobody-at-all");
    let by = ["--token-file", unknown.as_str()];
    let line = [&["vm", "list"][..], &there, &by].concat();
    let answer = cloud.run(&line);
    assert!(answer.exit != 0 && answer.stderr.contains("no operator token"), "{}", answer.stderr);
    let other = cloud.token("bar");
    let spare = cloud.token("cafe");
    let kept = tokens(&cloud);
    let states: Vec<_> = kept.iter().map(|(s, t, _)| (s.as_str(), t.as_str())).collect();
    assert_eq!(states, [("bar", "unused"), ("cafe", "unused"), ("cafe", "used")]);
    let _ = cloud.refused(&["site", "token", "withdraw", &kept[2].2], 5);
    let _ = cloud.refused(&["site", "token", "withdraw", "0123456789abcdef"], 4);
    let _ = cloud.ok(&["site", "token", "withdraw", &kept[0].2]);
    let a = cloud.ap_ends("bar", &["--join", &other]);
    assert!(a.exit == 1 && a.stderr.contains("withdrawn"), "{} {}", a.exit, a.stderr);

    let _ = cloud.refused(&["site", "revoke", "nobody"], 4);
    let _ = cloud.refused(&["site", "revoke", "center"], 2);
    let _ = cloud.ok(&["site", "revoke", "cafe"]);
    within(LOGGED_WITHIN, "the AP to be told", || {
        cloud.log_text(Daemon::Ap).contains("certificate is revoked").then_some(())
    });
    let words = cloud.refused(&[&["vm", "list"][..], &there].concat(), 1);
    assert!(words.contains("site 'cafe' does not reach its center now"), "{words}");
    let cafe = site(&cloud, "cafe").unwrap();
    assert_eq!((&cafe["revoked"], &cafe["state"]), (&true.into(), &"unreachable".into()));
    let words = cloud.run(&["site", "list"]).stdout;
    assert!(words.contains("revoked"), "{words}");
    for args in [["vm", "stop", "far"], ["vm", "delete", "far"]] {
        let words = cloud.refused(&args, 5);
        assert!(words.contains("site 'cafe' was revoked"), "{words}");
    }
    let _ = cloud.refused(&["vm", "create", "--image", "tiny", "--name", "b", "--site", "cafe"], 5);

    // Neither its daemon's return nor the tokens that were made for it bring it back.
    cloud.kill(Daemon::Ap);
    turned_away(&cloud, "this site's certificate is revoked; join again with a new token");
    let a = cloud.run(&["site", "join", &spare, "--replace", "--root", cloud.root()]);
    assert!(a.exit == 1 && a.stderr.contains("withdrawn"), "{} {}", a.exit, a.stderr);
    assert!(tokens(&cloud).iter().all(|(_, state, _)| state == "withdrawn"));
    // Nor does a center that was started anew forget.
    cloud.kill(Daemon::Center);
    cloud.restart_center();
    turned_away(&cloud, "this site's certificate is revoked");
    assert_eq!(site(&cloud, "cafe").unwrap()["revoked"], true);

    // The operator's word does, and its machine is still there.
    let new = cloud.token("cafe");
    let unchanged = cloud.run(&["site", "join", &new, "--root", cloud.root()]);
    assert_eq!(unchanged.exit, 3, "{}", unchanged.stderr);
    let _ = cloud.ok(&["site", "join", &new, "--replace", "--root", cloud.root()]);
    cloud.restart(Daemon::Ap);
    assert_eq!(site(&cloud, "cafe").unwrap()["revoked"], false);
    cloud.runs_at("far", "cafe");
    cloud.guest("far").answers();
    // The list of what was revoked is at the AP too.
    within(LOGGED_WITHIN, "the list of revoked certificates", || {
        let file = cloud.site_dir(Daemon::Ap).join("data/keys/revoked.json");
        let list: Value = serde_json::from_slice(&std::fs::read(file).ok()?).ok()?;
        (list["serials"].as_array()?.len() == 1).then_some(())
    });
}

/// Puts a certificate for `name` by another authority where the AP has its own. What it knows of
/// its center's authority stays, so that it is the center that finds a stranger.
fn by_another_authority(identity: &Path, name: &str) {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::create(dir.path()).unwrap();
    let name = Name::new(name).unwrap();
    let pending = PendingIdentity::make(&name, SiteKind::Ap).unwrap();
    let certificate = authority.issue(pending.request(), &name, SiteKind::Ap).unwrap();
    let strange = pending.complete(&certificate, authority.certificate()).unwrap();
    let ours = std::fs::read(identity.join("ca.der")).unwrap();
    strange.save(identity).unwrap();
    std::fs::write(identity.join("ca.der"), ours).unwrap();
}

#[test]
fn a_strangers_certificate_opens_no_link_and_changes_nothing() {
    let mut cloud = Cloud::start();
    let before = site(&cloud, "cafe").unwrap()["joined"].clone();
    cloud.kill(Daemon::Ap);
    let identity = cloud.site_dir(Daemon::Ap).join("data/keys/identity");
    let own: Vec<_> = ["ca.der", "site.key", "site.der"]
        .map(|f| (identity.join(f), std::fs::read(identity.join(f)).unwrap()))
        .into();

    // The name of a site that is known here, by an authority that is not.
    by_another_authority(&identity, "cafe");
    turned_away(&cloud, "the peer does not know this site");
    // A certificate of our own authority with a key that it was not made for does not even load.
    for (path, bytes) in own.iter().filter(|(p, _)| p.ends_with("site.der")) {
        std::fs::write(path, bytes).unwrap();
    }
    let a = cloud.ap_ends("cafe", &[]);
    assert!(a.exit == 1 && a.stderr.contains("another key"), "{} {}", a.exit, a.stderr);
    for (path, bytes) in &own {
        std::fs::write(path, bytes).unwrap();
    }
    let sites = cloud.ok(&["site", "list"]);
    assert_eq!(sites.as_array().unwrap().len(), 2, "{sites}");
    cloud.restart(Daemon::Ap);
    assert_eq!(site(&cloud, "cafe").unwrap()["joined"], before);
}

fn copy_all(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().flatten() {
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

#[test]
fn an_older_generation_does_not_take_a_machine_back() {
    let mut cloud = Cloud::start();
    cloud.bring_substrate();
    let _ = cloud.ok(&["vm", "activate", "base", "--name", "a", "--site", "cafe"]);
    let vm = cloud.vm("a");
    let (dir, old) = (cloud.vm_dir(&vm, Daemon::Ap), cloud.file("old"));
    let first = vm["generation"].as_u64().unwrap();
    copy_all(&dir, &old);
    let mut lines = cloud.guest("a").intact(0);
    let _ = cloud.ok(&["vm", "migrate", "a", "--to", "center"]);
    lines = cloud.guest("a").intact(lines);

    // The AP comes back from a copy of its disk in which it still has the machine.
    cloud.kill(Daemon::Ap);
    // It has removed what it had.
    let _ = std::fs::remove_dir_all(&dir);
    copy_all(&old, &dir);
    cloud.restart(Daemon::Ap);
    within(LOGGED_WITHIN, "the AP to give the machine up", || (!dir.exists()).then_some(()));
    assert_eq!(cloud.qemu(&vm, Daemon::Ap), None);
    cloud.runs_at("a", "center");
    assert_eq!(cloud.vm("a")["generation"].as_u64().unwrap(), first + 1);
    lines = cloud.guest("a").intact(lines);

    // The center comes back from a copy of its registry in which it still has the machine.
    let data = cloud.site_dir(Daemon::Center).join("data");
    let both = |cloud: &mut Cloud| {
        // So that the AP need not find out first that its link is gone.
        cloud.kill(Daemon::Ap);
        cloud.kill(Daemon::Center);
    };
    both(&mut cloud);
    std::fs::copy(data.join("registry.redb"), cloud.file("registry")).unwrap();
    cloud.restart_both();
    let _ = cloud.ok(&["vm", "migrate", "a", "--to", "cafe"]);
    lines = cloud.guest("a").intact(lines);
    let qemu = cloud.qemu(&vm, Daemon::Ap).expect("its QEMU");
    both(&mut cloud);
    std::fs::copy(cloud.file("registry"), data.join("registry.redb")).unwrap();
    cloud.restart_both();
    cloud.runs_at("a", "cafe");
    assert_eq!(cloud.vm("a")["generation"].as_u64().unwrap(), first + 2);
    assert_eq!(cloud.qemu(&vm, Daemon::Ap), Some(qemu));
    assert_eq!(cloud.qemu(&vm, Daemon::Center), None);
    lines = cloud.guest("a").intact(lines);

    // A site that makes a generation up takes nothing: it has no warrant for that.
    cloud.kill(Daemon::Ap);
    let record = dir.join("environment.json");
    let honest = std::fs::read(&record).unwrap();
    let mut forged: Value = serde_json::from_slice(&honest).unwrap();
    forged["record"]["generation"] = (first + 40).into();
    // As it is without its hash, which anybody could compute.
    std::fs::write(&record, forged["record"].to_string()).unwrap();
    let logged = cloud.log_text(Daemon::Center).len();
    cloud.restart(Daemon::Ap);
    within(LOGGED_WITHIN, "the claim to be refused", || {
        let log = cloud.log_text(Daemon::Center);
        log[logged..].contains("claim to a machine is not believed").then_some(())
    });
    assert_eq!(cloud.vm("a")["generation"].as_u64().unwrap(), first + 2);
    cloud.kill(Daemon::Ap);
    std::fs::write(&record, honest).unwrap();
    cloud.restart(Daemon::Ap);
    assert_eq!(cloud.qemu(&vm, Daemon::Ap), Some(qemu));
    lines = cloud.guest("a").intact(lines);
    // And it moves on under generations that nobody has seen.
    let _ = cloud.ok(&["vm", "migrate", "a", "--to", "center"]);
    assert_eq!(cloud.vm("a")["generation"].as_u64().unwrap(), first + 3);
    cloud.guest("a").intact(lines);
}

#[test]
fn the_certificate_of_another_site_makes_no_center() {
    let mut cloud = Cloud::start();
    // A site of this very cloud that was stolen.
    let token = cloud.file("token");
    std::fs::write(&token, cloud.token("bar")).unwrap();
    let token = format!("@{}", token.display());
    let _ = cloud.ok(&["site", "join", &token, "--root", cloud.root()]);
    let bar = Path::new(cloud.root()).join("bar/data/keys/identity");
    let address = cloud.center_link();
    cloud.kill(Daemon::Ap);
    cloud.kill(Daemon::Center);

    // It answers where the center was.
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let rogue = runtime.block_on(async {
        let bar = Identity::load(&bar).unwrap();
        let trust = Trust::new(bar.authority(), Revocations::default()).unwrap();
        Endpoint::bind(address, bar, trust, EndpointOptions::default()).unwrap()
    });
    let logged = cloud.log_text(Daemon::Ap).len();
    let daemon = cloud.start_unwanted(Daemon::Ap);
    within(LOGGED_WITHIN, "the AP to find out who answers", || {
        let words = "ap 'bar' answers where the center should";
        cloud.log_text(Daemon::Ap)[logged..].contains(words).then_some(())
    });
    // It tries again and again, and there is never a link to ask anything over.
    let linked = async { tokio::time::timeout(Duration::from_secs(1), rogue.accept()).await };
    assert!(runtime.block_on(linked).is_err(), "a link to a site that is no center");
    drop(daemon);
    runtime.block_on(rogue.close("done"));
    drop((rogue, runtime));
    cloud.restart_both();
}

/// What the certificate of a daemon's site says at this moment.
fn certificate(cloud: &Cloud, at: Daemon) -> Peer {
    let dir = cloud.site_dir(at).join("data/keys/identity");
    Identity::load(&dir).unwrap().me().clone()
}

/// The names in a process's environment, sorted.
fn environment(pid: i32) -> Vec<String> {
    let all = std::fs::read(format!("/proc/{pid}/environ")).unwrap();
    let words = all.split(|b| *b == 0).filter(|w| !w.is_empty());
    let name = |w: &[u8]| w.split(|b| *b == b'=').next().unwrap_or_default().to_vec();
    let mut names: Vec<_> = words.map(|w| String::from_utf8(name(w)).unwrap()).collect();
    names.sort();
    names
}

#[test]
fn certificates_are_renewed_over_the_link_and_relays_use_the_new_ones() {
    let mut cloud = Setup::new().flag(Daemon::Center, "--certificate-life=24").start();
    cloud.bring_substrate();
    let _ = cloud.ok(&["vm", "activate", "base", "--name", "a", "--site", "center"]);
    let both = [Daemon::Center, Daemon::Ap];
    let first = both.map(|at| certificate(&cloud, at));
    let lines = cloud.guest("a").intact(0);
    within(LOGGED_WITHIN, "both certificates to be renewed", || {
        let now = both.map(|at| certificate(&cloud, at).serial);
        (now[0] != first[0].serial && now[1] != first[1].serial).then_some(())
    });
    let mut moving = cloud.begin(&["vm", "migrate", "a", "--to", "cafe"]);
    let relay = loop {
        if let [relay] = cloud.relays(Daemon::Center)[..] {
            break relay;
        }
        assert!(moving.0.try_wait().unwrap().is_none(), "it moved without a relay");
    };
    // Neither gets what the daemon has in its environment: secrets of whoever started it.
    let named = environment(relay);
    assert!(
        named
            .iter()
            .all(|n| ["PATH", "GODWIT_HOLD", "GODWIT_LOG", "RUST_BACKTRACE"].contains(&n.as_str()))
    );
    assert!(moving.0.wait().unwrap().success());
    let qemu = cloud.qemu(&cloud.vm("a"), Daemon::Ap).expect("its QEMU");
    assert_eq!(environment(qemu), ["GODWIT_MACHINE", "PATH"]);
    let lines = cloud.guest("a").intact(lines);
    // The first ones end. Who showed them is linked by the later ones, and comes back with them.
    let last = first.iter().map(|c| c.not_after).max().unwrap();
    within(LOGGED_WITHIN, "the first certificates to end", || {
        (godwit_transfer::unix_now() > last + 1).then_some(())
    });
    cloud.kill(Daemon::Ap);
    cloud.restart(Daemon::Ap);
    cloud.runs_at("a", "cafe");
    cloud.guest("a").intact(lines);
}
