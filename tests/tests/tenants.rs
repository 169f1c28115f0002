//! Two tenants on one cloud, with real machines.
#![allow(clippy::unwrap_used)]

use std::os::unix::fs::PermissionsExt;

use godwit_tests::{Cloud, Daemon};

/// A file with the token of a new user.
fn token_of(cloud: &Cloud, tenant: &str, user: &str, role: &str) -> String {
    let _ = cloud.ok(&["user", "create", user, "--role", role, "--tenant", tenant]);
    let made = cloud.ok(&["token", "create", "--user", user, "--tenant", tenant]);
    let file = cloud.file(&format!("{user}.token"));
    std::fs::write(&file, made["token"].as_str().unwrap()).unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    file.to_str().unwrap().to_owned()
}

fn by<'a>(token: &'a str, args: &[&'a str]) -> Vec<&'a str> {
    [args, &["--token-file", token]].concat()
}

#[test]
fn two_tenants_share_a_site_and_neither_finds_what_the_other_has() {
    let mut cloud = Cloud::center_only();
    let archive = cloud.substrate_archive();
    let archive = archive.to_str().unwrap();
    for tenant in ["acme", "other"] {
        let _ = cloud.ok(&["tenant", "create", tenant]);
    }
    let ann = token_of(&cloud, "acme", "ann", "member");
    let adm = token_of(&cloud, "acme", "adm", "admin");
    let bob = token_of(&cloud, "other", "bob", "member");

    // Each brings the same file under the same name, and runs a machine of the same name.
    for (who, tenant) in [(&ann, "acme"), (&bob, "other")] {
        let made = cloud.ok(&by(who, &["substrate", "import", archive, "--name", "web"]));
        let s = &made["substrate"];
        assert_eq!((&s["tenant"], &s["kind"]), (&tenant.into(), &"restricted".into()), "{made}");
        let _ = cloud.ok(&by(who, &["vm", "activate", "web", "--name", "one"]));
        let list = cloud.ok(&by(who, &["vm", "list"]));
        assert_eq!(list.as_array().unwrap().len(), 1, "{list}");
    }
    let echo = |who: &str, vm: &str| {
        let program = ["--", "/bin/busybox", "echo", "here"];
        let answer = cloud.run(&[&["vm", "exec", "--token-file", who, vm], &program[..]].concat());
        assert_eq!(answer.stdout, "here\n", "{}", answer.stderr);
    };
    echo(&ann, "one");
    echo(&bob, "one");
    for line in [
        &["vm", "get", "acme/one"][..],
        &["vm", "delete", "acme/one"],
        &["substrate", "get", "acme/web"],
        &["vm", "activate", "acme/web"],
    ] {
        let words = cloud.refused(&by(&bob, line), 4);
        assert!(!words.contains("may not"), "{words}");
    }
    // One that is granted is used, and no longer when the grant is taken back.
    let _ = cloud.ok(&by(&ann, &["grant", "create", "web", "other"]));
    let _ = cloud.ok(&by(&bob, &["vm", "activate", "acme/web", "--name", "lent"]));
    let _ = cloud.ok(&by(&ann, &["grant", "delete", "web", "other"]));
    let _ = cloud.refused(&by(&bob, &["vm", "activate", "acme/web"]), 4);
    let words = cloud.refused(&by(&ann, &["substrate", "delete", "web"]), 5);
    assert!(words.contains("in use by") && !words.contains("lent"), "{words}");

    // What is private is its owner's alone, also while it runs, and once at a time.
    let dock = ["vm", "dock", "one", "--name", "diary", "--kind", "private"];
    let _ = cloud.ok(&by(&ann, &dock));
    assert!(cloud.refused(&by(&adm, &["vm", "activate", "diary"]), 1).contains("may not"));
    let _ = cloud.ok(&by(&ann, &["vm", "activate", "diary", "--name", "mine"]));
    let words = cloud.refused(&by(&ann, &["vm", "activate", "diary"]), 5);
    assert!(words.contains("once at a time"), "{words}");
    let words = cloud.refused(&by(&adm, &["vm", "stop", "mine"]), 1);
    assert!(words.contains("this private machine"), "{words}");
    let words = cloud.refused(&by(&adm, &["token", "create", "--user", "ann"]), 5);
    assert!(words.contains("made by itself"), "{words}");

    // A center that is started again knows whose each is; machines run on.
    cloud.kill(Daemon::Center);
    cloud.restart_center();
    for (who, vms, substrates) in [(&ann, 1, 2), (&bob, 2, 1)] {
        for (noun, n) in [("vm", vms), ("substrate", substrates)] {
            let list = cloud.ok(&by(who, &[noun, "list"]));
            assert_eq!(list.as_array().unwrap().len(), n, "{list}");
        }
    }
    let line = ["vm", "exec", "--token-file", &ann, "mine", "--", "/bin/busybox", "echo", "on"];
    let answer = cloud.run(&line);
    assert_eq!(answer.stdout, "on\n", "{}", answer.stderr);
    let ends = cloud.ok(&["audit", "verify"]);
    assert!(ends["entries"].as_u64().unwrap() > 20, "{ends}");
}
