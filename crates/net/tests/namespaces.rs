//! Networks in real namespaces; as root. A machine is played by a namespace whose veth is a port of
//! the network's bridge under the name of its TAP.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

use godwit_net::{Attachment, Member, Network, NetworkKind, Networks, Prefix, Rest, With};
use godwit_qemu::MacAddress;
use godwit_testkit::World;
use godwit_types::{Name, NetworkId, VmId};

fn sh(script: &str) -> Output {
    Command::new("sh").args(["-c", script]).output().unwrap()
}

fn ok(script: &str) -> String {
    let out = sh(script);
    assert!(out.status.success(), "{script}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

/// A site of its own; what it has made goes with it.
struct Site {
    dir: tempfile::TempDir,
    networks: Networks,
    guests: Vec<String>,
}

impl Site {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let networks = Networks::of(dir.path());
        Self { dir, networks, guests: Vec::new() }
    }

    /// Has the guest of `member` be on the line, in a namespace of its own.
    fn plug(&mut self, member: &Member) -> Guest {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let (n, pid) = (NEXT.fetch_add(1, Ordering::Relaxed), std::process::id());
        let namespace = format!("gwtest-{pid}-{n}");
        let (of, tap) = (self.namespace(member), &member.tap);
        let Attachment { mac, address, network } = &member.attachment;
        let (bits, gateway) = (network.prefix.bits(), network.prefix.gateway());
        ok(&format!(
            "ip netns add {namespace} && ip -n {of} link del {tap} && \
             ip -n {of} link add {tap} type veth peer name eth0 netns {namespace} && \
             ip -n {of} link set {tap} master br0 up && \
             ip -n {namespace} link set eth0 address {mac} && \
             ip -n {namespace} addr add {address}/{bits} dev eth0 && \
             ip -n {namespace} link set eth0 up && ip -n {namespace} link set lo up && \
             ip -n {namespace} route add default via {gateway}"
        ));
        self.guests.push(namespace.clone());
        Guest { namespace }
    }

    /// Has the site's networks be those of `members`.
    fn has(&self, rt: &tokio::runtime::Handle, members: &[Member]) {
        let troubles = rt.block_on(self.networks.apply(members, Rest::Goes));
        assert!(troubles.is_empty(), "{troubles:?}");
    }

    fn namespace(&self, member: &Member) -> String {
        self.networks.tap(member.attachment.network.id, VmId::new()).namespace
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        for guest in &self.guests {
            let _ = sh(&format!("ip netns del {guest}"));
        }
        let networks = Networks::of(self.dir.path());
        let done =
            tokio::runtime::Runtime::new().unwrap().block_on(networks.apply(&[], Rest::Goes));
        assert!(done.is_empty() || std::thread::panicking(), "{done:?}");
    }
}

struct Guest {
    namespace: String,
}

impl Guest {
    fn run(&self, script: &str) -> Output {
        let output = Command::new("ip")
            .args(["netns", "exec", &self.namespace, "sh", "-c", script])
            .output();
        output.unwrap()
    }

    fn pings(&self, to: &str) -> bool {
        self.run(&format!("busybox ping -c 1 -W 1 {to}")).status.success()
    }

    /// Sends a frame as it is, from the interface.
    fn sends(&self, frame: &[u8]) {
        let hex: String = frame.iter().map(|b| format!("\\x{b:02x}")).collect();
        let py = format!(
            "import socket; s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW); \
             s.bind(('eth0', 0)); s.send(b'{hex}')"
        );
        let sent = self.run(&format!("python3 -c \"{py}\""));
        assert!(sent.status.success(), "{}", String::from_utf8_lossy(&sent.stderr));
    }

    /// Has it take down each frame that comes; [`taken`] tells which, up to one that ends in `last`.
    fn takes_down(&self, last: u8) -> std::process::Child {
        let py = format!(
            "import socket; s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)); \
             s.settimeout(10); print('listens', flush=True)\n\
             while True:\n f = s.recv(4096); len(set(f[-40:])) == 1 and print(f[-1], flush=True)\n if f[-40:] == bytes([{last}] * 40): break"
        );
        let mut listens = Command::new("ip")
            .args(["netns", "exec", &self.namespace, "python3", "-c", &py])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut first = [0; 8];
        std::io::Read::read_exact(listens.stdout.as_mut().unwrap(), &mut first).unwrap();
        listens
    }
}

/// The last bytes of the frames that came.
fn taken(listens: std::process::Child) -> Vec<u8> {
    let out = listens.wait_with_output().unwrap();
    assert!(out.status.success(), "what may pass did not come");
    let text = String::from_utf8(out.stdout).unwrap();
    text.lines().filter_map(|l| l.parse().ok()).collect()
}

/// Fetches a page from there.
fn fetch(address: &str) -> String {
    let get = format!("u.urlopen('http://{address}/hostname', timeout=3).read().decode()");
    format!("python3 -c \"import urllib.request as u; print({get})\"")
}

/// A port of this host that leads on to a web server, as containers publish theirs.
struct Publishes(String);

impl Publishes {
    const PORT: u16 = 8093;

    fn new(to: &str) -> Self {
        let table = format!("gwtest_{}", std::process::id());
        let rule = format!("tcp dport {} dnat ip to {to}:80", Self::PORT);
        ok(&format!(
            "nft 'table inet {table} {{ chain pre {{ type nat hook prerouting priority -100; {rule}; }}; }}'"
        ));
        Self(table)
    }
}

impl Drop for Publishes {
    fn drop(&mut self) {
        let _ = sh(&format!("nft delete table inet {}", self.0));
    }
}

fn network(name: &str, kind: NetworkKind, prefix: &str) -> Network {
    let prefix: Prefix = prefix.parse().unwrap();
    Network { id: NetworkId::new(), name: Name::new(name).unwrap(), kind, prefix }
}

fn member(network: &Network, name: &str, nth: usize) -> Member {
    let address = network.prefix.hosts().nth(nth).unwrap();
    let vm = VmId::new();
    let b = vm.0.as_bytes();
    let mac = MacAddress::from_seed([b[11], b[12], b[13], b[14], b[15]]);
    let attachment = Attachment { network: network.clone(), mac, address };
    Member::new(vm, Name::new(name).unwrap(), attachment)
}

#[tokio::test(flavor = "multi_thread")]
async fn machines_reach_each_other_and_the_world_and_networks_keep_apart() {
    tokio::task::spawn_blocking(|| {
        let rt = tokio::runtime::Handle::current();
        let world = World::new();
        let mut site = Site::new();
        let (one, two) =
            (network("one", NetworkKind::Nat, "10.80.0.0/24"), network("two", NetworkKind::Nat, "10.80.0.0/24"));
        let alone = network("alone", NetworkKind::Private, "10.81.0.0/24");
        // Both networks have the same prefix, and two of their machines the same address.
        let members =
            [member(&one, "a", 0), member(&one, "b", 1), member(&two, "c", 2), member(&alone, "d", 0)];
        site.has(&rt, &members);
        let [a, b, c, d] = [0, 1, 2, 3].map(|n| site.plug(&members[n]));
        let fetches = |g: &Guest| {
            let got = g.run(&fetch(&world.address));
            got.status.success() && !got.stdout.is_empty()
        };
        assert!(a.pings("10.80.0.3") && b.pings("10.80.0.2") && a.pings("10.80.0.1"));
        assert!(fetches(&a) && fetches(&b) && fetches(&c), "the world is there");
        assert!(!fetches(&d) && d.pings("10.81.0.1"), "a private network ends at its edge");
        assert!(!a.pings("10.80.0.4") && !c.pings("10.80.0.2"), "networks of one prefix keep apart");

        // Nothing of the host is reached, by any address that it has.
        let host = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
        let port = host.local_addr().unwrap().port();
        let addresses = ok("ip -4 -o addr show | awk '{sub(\"/.*\", \"\", $4); print $4}'");
        for address in addresses.lines().filter(|a| *a != "127.0.0.1") {
            let tried = a.run(&format!("busybox nc -w 1 {address} {port} </dev/null"));
            assert!(!tried.status.success() && !a.pings(address), "{address} answers");
        }
        // Nor what is no place in the world, though the host reaches it there: clouds keep keys so.
        world.also_at("169.254.77.77");
        assert!(!ok(&fetch("169.254.77.77")).is_empty(), "it is there");
        assert!(!a.run(&fetch("169.254.77.77")).status.success(), "the link's addresses answer");
        // Nor what the host publishes for others at its own address.
        let publishes = Publishes::new(&world.address);
        for address in addresses.lines().filter(|a| *a != "127.0.0.1") {
            let tried = a.run(&fetch(&format!("{address}:{}", Publishes::PORT)));
            assert!(!tried.status.success(), "{address} publishes for guests");
        }
        drop(publishes);
        // The gateway offers names and addresses, and nothing else.
        let scan = a.run(
            "for p in 22 80 443 7700 8080; do busybox nc -w 1 10.80.0.1 $p </dev/null && echo $p; done",
        );
        assert!(scan.stdout.is_empty(), "{scan:?}");
        let named = a.run("busybox nslookup b.one.internal 10.80.0.1");
        assert!(String::from_utf8_lossy(&named.stdout).contains("10.80.0.3"), "{named:?}");
        let foreign = a.run("busybox nslookup c.two.internal 10.80.0.1");
        assert!(!String::from_utf8_lossy(&foreign.stdout).contains("10.80.0.4"), "{foreign:?}");
        let lease = a.run("busybox udhcpc -i eth0 -n -q -f -t 5 -T 1 -s /bin/true 2>&1");
        assert!(String::from_utf8_lossy(&lease.stdout).contains("10.80.0.2"), "{lease:?}");

        // A new daemon finds it all, and changes nothing; what somebody broke it puts right.
        let of = site.namespace(&members[0]);
        let mut ping = Command::new("ip")
            .args(["netns", "exec", &a.namespace, "busybox", "ping", "-c", "20", "-i", "0.05", "10.80.0.3"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        site.networks = Networks::of(site.dir.path());
        site.has(&rt, &members);
        assert!(ping.wait().unwrap().success());
        ok(&format!("ip netns del {of}"));
        site.has(&rt, &members);
        assert!(fetches(&a) && a.pings("10.80.0.3"), "its namespace is the same");
        ok(&format!("ip netns exec {of} nft flush ruleset"));
        ok(&format!("kill -9 $(cat /run/godwit-net/{of}/pid)"));
        site.has(&rt, &members);
        assert!(ok(&format!("ip netns exec {of} nft list ruleset")).contains("policy drop"));
        assert!(fetches(&a), "put right");
        let named = a.run("busybox nslookup b.one.internal 10.80.0.1");
        assert!(String::from_utf8_lossy(&named.stdout).contains("10.80.0.3"), "{named:?}");

        // A network whose last machine goes leaves nothing.
        site.has(&rt, &members[3..]);
        assert!(!ok("ip netns list").contains(&of) && !Path::new("/run/godwit-net").join(&of).exists());
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn one_broken_network_keeps_no_other_from_being_there() {
    tokio::task::spawn_blocking(|| {
        let rt = tokio::runtime::Handle::current();
        let mut site = Site::new();
        let (one, two) = (
            network("one", NetworkKind::Private, "10.83.0.0/24"),
            network("two", NetworkKind::Private, "10.83.0.0/24"),
        );
        let members = [member(&one, "a", 0), member(&two, "b", 0)];
        let [cut, broken] = [0, 1].map(|n| site.namespace(&members[n]));
        // The making of one's namespace was cut short; the files of the other's server have no room.
        std::fs::create_dir_all("/run/netns").unwrap();
        std::fs::write(Path::new("/run/netns").join(cut), "").unwrap();
        let files = Path::new("/run/godwit-net").join(broken);
        std::fs::create_dir_all("/run/godwit-net").unwrap();
        std::fs::write(&files, "").unwrap();
        let troubles = rt.block_on(site.networks.apply(&members, Rest::Goes));
        std::fs::remove_file(&files).unwrap();
        assert_eq!(troubles.len(), 1, "{troubles:?}");
        assert_eq!(troubles[0].with, With::Network(two.id));
        let a = site.plug(&members[0]);
        assert!(a.pings("10.83.0.1"));
        site.has(&rt, &members);
        let b = site.plug(&members[1]);
        assert!(b.pings("10.83.0.1"));
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_is_the_next_machines_at_once() {
    tokio::task::spawn_blocking(|| {
        let rt = tokio::runtime::Handle::current();
        let mut site = Site::new();
        let net = network("one", NetworkKind::Private, "10.84.0.0/24");
        // Each asks by DHCP alone; names that a server would take for words are none.
        let [old, new] = ["ignore", "30m"].map(|name| member(&net, name, 1));
        let stays = member(&net, "stays", 0);
        for one in [old, new] {
            site.has(&rt, &[stays.clone(), one.clone()]);
            let asks = "busybox udhcpc -i eth0 -n -q -f -t 5 -T 1 -s /bin/true 2>&1";
            let lease = site.plug(&one).run(asks);
            assert!(String::from_utf8_lossy(&lease.stdout).contains("10.84.0.3"), "{lease:?}");
        }
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_guest_forges_reaches_nobody() {
    tokio::task::spawn_blocking(|| {
        let rt = tokio::runtime::Handle::current();
        let mut site = Site::new();
        let net = network("one", NetworkKind::Nat, "10.82.0.0/24");
        let members = [member(&net, "bad", 0), member(&net, "victim", 1)];
        site.has(&rt, &members);
        let [bad, victim] = [0, 1].map(|n| site.plug(&members[n]));
        assert!(bad.pings("10.82.0.3"));
        let [own, to] = [0, 1].map(|n| members[n].attachment.mac.0);
        let forged = [0x52, 9, 9, 9, 9, 9];
        let (gateway, mine, his) = ([10, 82, 0, 1], [10, 82, 0, 2], [10, 82, 0, 3]);
        let ethernet = |to: [u8; 6], from: [u8; 6], kind: u16, rest: Vec<u8>| {
            [&to[..], &from, &kind.to_be_bytes(), &rest].concat()
        };
        let arp = |mac: [u8; 6], ip: [u8; 4]| {
            [&[0, 1, 8, 0, 6, 4, 0, 2][..], &mac, &ip, &to, &his].concat()
        };
        let udp = |from: [u8; 4], sport: u16, dport: u16| {
            let mut ip = [&[0x45, 0, 0, 32, 0, 1, 0, 0, 64, 17, 0, 0][..], &from, &his].concat();
            let sum: u32 = ip.chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(w[1])).sum();
            let sum = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
            ip[10..12].copy_from_slice(&sum.to_be_bytes());
            let ports = [sport.to_be_bytes(), dport.to_be_bytes(), [0, 12], [0, 0]].concat();
            [ip, ports, vec![0; 4]].concat()
        };
        let advertisement = [&[0x60, 0, 0, 0, 0, 16, 58, 255][..], &[0; 32], &[134, 0]].concat();
        let cases = [
            ("another's address of the card", ethernet(to, forged, 0x0800, udp(mine, 9, 9))),
            ("another's address", ethernet(to, own, 0x0800, udp([10, 82, 0, 77], 9, 9))),
            ("the gateway's in ARP", ethernet(to, own, 0x0806, arp(own, gateway))),
            ("another card's in ARP", ethernet(to, own, 0x0806, arp(forged, mine))),
            ("a DHCP server", ethernet(to, own, 0x0800, udp(mine, 67, 68))),
            ("a router advertisement", ethernet(to, own, 0x86dd, advertisement)),
            ("a VLAN tag", ethernet(to, own, 0x8100, [vec![0, 5, 8, 0], udp(mine, 9, 9)].concat())),
            ("two VLAN tags", ethernet(to, own, 0x88a8, vec![0, 5, 0x81, 0, 0, 6, 8, 0])),
            ("a frame of a kind of its own", ethernet(to, own, 0x88b5, vec![1])),
        ];
        let marked = |frame: &[u8], mark: u8| [frame, &[mark; 40]].concat();
        let send_all = || {
            let listens = victim.takes_down(200);
            for (n, (_, frame)) in (100..).zip(&cases) {
                bad.sends(&marked(frame, n));
            }
            bad.sends(&marked(&ethernet(to, own, 0x0800, udp(mine, 9, 9)), 200));
            taken(listens)
        };
        let came = send_all();
        for (n, (what, _)) in (100..).zip(&cases) {
            assert!(!came.contains(&n), "{what} comes through");
        }
        assert!(bad.pings("10.82.0.3"));
        // Without the rules all of it would.
        ok(&format!(
            "ip netns exec {} nft delete table bridge godwit",
            site.namespace(&members[0])
        ));
        let came = send_all();
        for (n, (what, _)) in (100..).zip(&cases) {
            assert!(came.contains(&n), "{what} is not tried");
        }
    })
    .await
    .unwrap();
}
