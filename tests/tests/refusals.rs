//! What must be refused, with what words and exit codes.
#![allow(clippy::unwrap_used)]

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use godwit_tests::{Cloud, Daemon, flip, within};

fn substrates(cloud: &Cloud) -> usize {
    cloud.ok(&["substrate", "list"]).as_array().unwrap().len()
}

/// Units that the pool of the center holds, and files that it keeps of substrates.
fn held(cloud: &Cloud) -> usize {
    let kept = std::fs::read_dir(cloud.site_dir(Daemon::Center).join("data/substrates"))
        .map_or(0, Iterator::count);
    substrates(cloud) + kept
}

#[test]
fn bad_words_and_unknown_things_are_refused() {
    let cloud = Cloud::center_only();
    cloud.bring_substrate();
    let _ = cloud.ok(&["vm", "activate", "base", "--name", "a"]);

    let words = cloud.refused(&["vm", "migrate", "a", "--to", "nowhere"], 4);
    assert!(words.contains("nowhere"), "{words}");
    let words =
        cloud.refused(&["vm", "create", "--image", "tiny", "--name", "b", "--site", "nowhere"], 4);
    assert!(words.contains("nowhere"), "{words}");
    let _ = cloud.refused(&["vm", "get", "nobody"], 4);
    let _ = cloud.refused(&["substrate", "get", "nothing"], 4);
    let _ = cloud.refused(&["vm", "activate", "nothing", "--name", "b"], 4);
    let _ = cloud.refused(&["vm", "create", "--image", "nothing", "--name", "b"], 4);

    for bad in ["../x", "a/b", "A", "", "-x", "a b", "..", "a%2fb", &"n".repeat(200)] {
        let _ = cloud.refused(&["vm", "activate", "base", "--name", bad], 2);
        let _ = cloud.refused(&["site", "token", bad], 2);
        // That names a tenant, of which there is none.
        let exit = if bad == "a/b" { 4 } else { 2 };
        let _ = cloud.refused(&["vm", "get", bad], exit);
    }
    let _ = cloud.refused(&["vm", "activate", "base", "--name", "a"], 5);

    let names: Vec<String> = cloud
        .ok(&["vm", "list"])
        .as_array()
        .unwrap()
        .iter()
        .map(|v| v["name"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(names, ["a"]);
    assert_eq!(cloud.vm("a")["state"], "running");
    cloud.guest("a").intact(0);
}

#[test]
fn a_bad_token_lets_nobody_in() {
    let cloud = Cloud::center_only();
    let good = cloud.token("cafe");
    let mut middle = good.clone().into_bytes();
    let at = middle.len() / 2;
    middle[at] = if middle[at] == b'a' { b'b' } else { b'a' };
    let changed = String::from_utf8(middle).unwrap();
    for bad in ["", "gwj1/", "nonsense", &good[..good.len() - 20], &changed] {
        let a = cloud.ap_ends("cafe", &["--join", bad]);
        assert!(a.exit > 0, "{bad:?}: {}{}", a.stdout, a.stderr);
        assert!(a.stderr.contains("error: "), "{bad:?}: {}", a.stderr);
        assert!(!a.stderr.contains("panicked"), "{bad:?}: {}", a.stderr);
    }
    // One that was made for another site.
    let a = cloud.ap_ends("bar", &["--join", &good]);
    assert_eq!(a.exit, 2, "{}", a.stderr);
    // One that is no good any more, as it is and with a later end written into it.
    let short = cloud.ok(&["site", "token", "cafe", "--lifetime", "1s"]);
    let short = short["token"].as_str().unwrap().to_owned();
    let (rest, end) = short.rsplit_once('/').unwrap();
    let end: u64 = end.parse().unwrap();
    within(Duration::from_secs(30), "the token's end", || {
        let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap();
        (now > Duration::from_secs(end + 1)).then_some(())
    });
    for late in [short.clone(), format!("{rest}/{}", end + 3600)] {
        let a = cloud.ap_ends("cafe", &["--join", &late]);
        assert!(a.exit > 0 && a.stderr.contains("error: "), "{}", a.stderr);
    }
    assert!(!cloud.site_dir(Daemon::Ap).join("data/keys/identity").exists());
    let sites = cloud.ok(&["site", "list"]);
    assert_eq!(sites.as_array().unwrap().len(), 1, "{sites}");
}

#[test]
fn archives_that_are_no_substrates_leave_nothing_behind() {
    let mut cloud = Cloud::center_only();
    let good = cloud.substrate_archive();
    assert_eq!(held(&cloud), 0);
    let bytes = std::fs::metadata(&good).unwrap().len();
    let import = |file: &Path, why: &str| {
        let a = cloud.run(&["substrate", "import", file.to_str().unwrap()]);
        assert!(a.exit > 0, "{why}: {}", a.stdout);
        assert!(a.stderr.contains("error: "), "{why}: {}", a.stderr);
        assert!(!a.stderr.contains("panicked"), "{why}: {}", a.stderr);
        assert_eq!(held(&cloud), 0, "{why}: something is left");
    };

    let file = cloud.file("x.gwsa");
    for (why, keep) in [("empty", 0), ("a head", 100), ("half", bytes / 2), ("most", bytes - 1)] {
        std::fs::copy(&good, &file).unwrap();
        let f = std::fs::File::options().write(true).open(&file).unwrap();
        f.set_len(keep).unwrap();
        import(&file, why);
    }
    std::fs::copy(&good, &file).unwrap();
    flip(&file, bytes / 2);
    import(&file, "a flipped bit");
    std::fs::copy(&good, &file).unwrap();
    flip(&file, 4);
    import(&file, "another version");
    std::fs::write(&file, vec![0x7f; 1 << 20]).unwrap();
    import(&file, "foreign");

    // Its site is killed before and after it is published: nothing of it is there, or all.
    for (step, there) in [("publish.stored", 0), ("publish.renamed", 1)] {
        cloud.hold(step);
        let import = cloud.begin(&["substrate", "import", good.to_str().unwrap()]);
        let _ = cloud.held(step);
        cloud.kill(Daemon::Center);
        cloud.let_go(step);
        drop(import);
        cloud.restart_center();
        assert_eq!(held(&cloud), there * 2, "{step}");
        let _ = cloud.ok(&["pool", "check"]);
    }
    let _ = cloud.ok(&["substrate", "delete", "base"]);
    assert_eq!(held(&cloud), 0);

    // The good one is taken after all that, once.
    cloud.bring_substrate();
    assert_eq!(substrates(&cloud), 1);
    let _ = cloud.refused(&["substrate", "import", good.to_str().unwrap()], 5);
    let _ = cloud.ok(&["vm", "activate", "base", "--name", "a"]);
    cloud.guest("a").intact(0);
}

#[test]
fn a_flipped_bit_in_the_store_is_named_and_refused() {
    let mut cloud = Cloud::center_only();
    cloud.bring_substrate();
    let clean = cloud.ok(&["pool", "check"]);
    assert!(clean[0]["check"]["units"].as_u64().unwrap() > 0, "{clean}");

    // The first record of the longest pack: a head of 44 bytes, the hash at its end, then the body.
    let dir = cloud.site_dir(Daemon::Center).join("data/store");
    let pack = files(&dir)
        .into_iter()
        .filter(|f| std::fs::read(f).is_ok_and(|b| b.starts_with(b"GWU1")))
        .max_by_key(|f| std::fs::metadata(f).unwrap().len())
        .expect("a pack");
    let mut head = [0; 44];
    std::fs::File::open(&pack).unwrap().read_exact_at(&mut head, 0).unwrap();
    let hash: String = head[12..].iter().map(|b| format!("{b:02x}")).collect();
    flip(&pack, 46);

    let words = cloud.refused(&["pool", "check", "--site", "center"], 1);
    assert!(words.contains("damaged") && words.contains(&hash), "{hash}: {words}");

    // A daemon that starts knows nothing of it, until it has looked by itself.
    cloud.kill(Daemon::Center);
    cloud.set_flags(Daemon::Center, &["--scrub-every", "1"]);
    cloud.restart_center();
    within(Duration::from_secs(60), "the damage to be found unasked", || {
        let all = cloud.ok(&["substrate", "list"]);
        all[0]["damaged"]["center"].as_str()?.contains(&hash).then_some(())
    });
}

fn files(dir: &Path) -> Vec<std::path::PathBuf> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() { all.extend(files(&path)) } else { all.push(path) }
    }
    all
}
