//! Who may not, or not any more: strangers, revoked sites, old tokens, older generations.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::time::Duration;

use godwit_tests::{Cloud, Daemon, within};
use godwit_transfer::Authority;
use godwit_transfer::keys::PendingIdentity;
use godwit_types::{Name, SiteKind};
use serde_json::Value;

/// How long a daemon may take to try its center and to be told.
const TOLD_WITHIN: Duration = Duration::from_secs(60);

fn site(cloud: &Cloud, name: &str) -> Option<Value> {
    let sites = cloud.ok(&["site", "list"]);
    sites.as_array().unwrap().iter().find(|s| s["name"] == name).cloned()
}

/// Waits until a daemon, started as it is now, has been refused with these words and the center
/// has logged that.
fn turned_away(cloud: &Cloud, words: &str) {
    let (ap, center) = (cloud.said(Daemon::Ap).len(), cloud.said(Daemon::Center).len());
    let _daemon = cloud.start_unwanted(Daemon::Ap);
    within(TOLD_WITHIN, &format!("the AP to be told {words:?}"), || {
        cloud.said(Daemon::Ap)[ap..].contains(words).then_some(())
    });
    within(TOLD_WITHIN, "the center to log it", || {
        cloud.said(Daemon::Center)[center..].contains("refused a link").then_some(())
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
    let mut cloud = Cloud::start();
    let _ = cloud.ok(&["vm", "create", "--image", "tiny", "--name", "far", "--site", "cafe"]);
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
    within(TOLD_WITHIN, "the AP to be told", || {
        cloud.said(Daemon::Ap).contains("certificate is revoked").then_some(())
    });
    let cafe = site(&cloud, "cafe").unwrap();
    assert_eq!((&cafe["revoked"], &cafe["state"]), (&true.into(), &"unreachable".into()));
    let words = cloud.run(&["site", "list"]).stdout;
    assert!(words.contains("revoked"), "{words}");
    for args in [["vm", "stop", "far"], ["vm", "delete", "far"]] {
        let words = cloud.refused(&args, 5);
        assert!(words.contains("site 'cafe' was revoked"), "{words}");
    }
    let _ = cloud.refused(&["vm", "create", "--image", "tiny", "--name", "b", "--site", "cafe"], 1);

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
    within(TOLD_WITHIN, "the list of revoked certificates", || {
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
    std::fs::remove_dir_all(&dir).unwrap();
    copy_all(&old, &dir);
    cloud.restart(Daemon::Ap);
    within(TOLD_WITHIN, "the AP to give the machine up", || (!dir.exists()).then_some(()));
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
    // And it moves on under generations that nobody has seen.
    let _ = cloud.ok(&["vm", "migrate", "a", "--to", "center"]);
    assert_eq!(cloud.vm("a")["generation"].as_u64().unwrap(), first + 3);
    cloud.guest("a").intact(lines);
}
