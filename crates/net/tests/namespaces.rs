//! Networks in real namespaces; as root. A machine is played by a namespace whose veth is a port of
//! the network's bridge under the name of its TAP.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::path::Path;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

use godwit_net::{
    Attachment, Member, Network, NetworkKind, Networks, Prefix, PublishedPort, Rest, With,
    forward_drops, programs_started,
};
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
        let mark = std::fs::read_to_string(self.dir.path().join("network-mark")).unwrap();
        let left = Path::new("/run/godwit-net").join(format!("godwit_{}", &mark[..5]));
        assert!(!left.exists() || std::thread::panicking(), "{} is left", left.display());
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
        let ping = Command::new("ip")
            .args(["netns", "exec", &a.namespace, "busybox", "ping", "-c", "20", "-i", "0.05", "10.80.0.3"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        site.networks = Networks::of(site.dir.path());
        site.has(&rt, &members);
        let pings = String::from_utf8(ping.wait_with_output().unwrap().stdout).unwrap();
        assert!(pings.contains(" 0% packet loss"), "{pings}");
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

/// How many programs `what` starts, and the seconds that it takes.
fn programs(what: impl FnOnce()) -> (u64, f64) {
    let (before, begun) = (programs_started(), std::time::Instant::now());
    what();
    (programs_started() - before, begun.elapsed().as_secs_f64())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_look_that_finds_nothing_changed_starts_no_program() {
    tokio::task::spawn_blocking(|| {
        let rt = tokio::runtime::Handle::current();
        let mut site = Site::new();
        // As many as one asks for by hand, to see the figures of a big site.
        let many = std::env::var("GODWIT_TEST_NETWORKS").ok().and_then(|n| n.parse().ok());
        let many: usize = many.unwrap_or(3);
        let net = |n| network(&format!("n{n}"), NetworkKind::Nat, "10.85.0.0/24");
        let nets: Vec<Network> = (0..many).map(net).collect();
        let mut members: Vec<Member> =
            nets.iter().flat_map(|n| [member(n, "a", 0), member(n, "b", 1)]).collect();
        let (made, took) = programs(|| site.has(&rt, &members));
        println!("{many} networks: made by {made} programs in {took:.3} s");
        let (looked, took) = programs(|| site.has(&rt, &members));
        println!("a look: {looked} programs, {took:.3} s");
        // Another table of the host's may change meanwhile, then its own is listed.
        assert!(looked <= 2, "{looked}");
        site.networks = Networks::of(site.dir.path());
        let (adopted, took) = programs(|| site.has(&rt, &members));
        println!("the next daemon's: {adopted} programs, {took:.3} s");
        assert!(adopted <= 2, "{adopted}");

        // What a start needs is its own network: no other one is looked at.
        let of = site.namespace(&members[2]);
        ok(&format!("ip -n {of} link set br0 down"));
        members.push(member(&nets[0], "c", 2));
        let apply = site.networks.apply_one(nets[0].id, &members, Rest::Goes);
        let (started, _) = programs(|| assert!(rt.block_on(apply).is_empty()));
        assert!(started <= 6, "{started}");
        let state = |of: &str| ok(&format!("ip -n {of} -o link show br0"));
        assert!(!state(&of).contains(",UP"), "it is another's");
        // A look finds what a hand has changed, by one run of what puts it right.
        let (righted, _) = programs(|| site.has(&rt, &members));
        assert!(righted <= 3 && state(&of).contains(",UP"), "{righted}");
    })
    .await
    .unwrap();
}

/// A network namespace that stands for a host with a firewall of its own.
struct Host(String);

impl Drop for Host {
    fn drop(&mut self) {
        let _ = sh(&format!("ip netns del {}", self.0));
    }
}

#[tokio::test]
async fn a_firewall_that_drops_what_is_forwarded_is_told_with_the_lines_that_let_it_through() {
    let host = Host(format!("gwtest-fw-{}", std::process::id()));
    ok(&format!("ip netns add {}", host.0));
    let within = |line: &str| ok(&format!("ip netns exec {} {line}", host.0));
    let told = async || forward_drops(Some(&host.0)).await.unwrap();
    assert_eq!(told().await, Vec::<String>::new());
    within("nft 'add table ip filter'");
    let chain = "{ type filter hook forward priority 0; policy drop; }";
    within(&format!("nft 'add chain ip filter FORWARD {chain}'"));
    let words = told().await;
    let [words] = &words[..] else { panic!("{words:?}") };
    assert!(
        words.starts_with("chain 'FORWARD' of the firewall's table 'ip filter' drops"),
        "{words}"
    );
    // What it says to do, as it stands there.
    let (_, lines) = words.split_once("with: ").unwrap();
    let lines = lines.replace("nft insert", &format!("ip netns exec {} nft insert", host.0));
    ok(&lines);
    assert_eq!(told().await, Vec::<String>::new());
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

/// Servers that say who asks: over TCP, line by line, at 80 and 81, and over UDP at 53.
const SERVERS: &str = "
import socketserver as s, threading as t
class T(s.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            self.wfile.write(self.client_address[0].encode() + b'\\n')
class U(s.DatagramRequestHandler):
    def handle(self):
        self.wfile.write(self.client_address[0].encode())
s.ThreadingTCPServer.allow_reuse_address = True
for server in [s.ThreadingTCPServer(('', 80), T), s.ThreadingTCPServer(('', 81), T), s.ThreadingUDPServer(('', 53), U)]:
    t.Thread(target=server.serve_forever).start()
print('serves', flush=True)
";

/// Servers in a guest; they end with this.
struct Serves(std::process::Child);

impl Serves {
    fn at(guest: &Guest) -> Self {
        let mut child = Command::new("ip")
            .args(["netns", "exec", &guest.namespace, "python3", "-c", SERVERS])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut first = [0; 6];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut first).unwrap();
        Self(child)
    }
}

impl Drop for Serves {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A line of shell that asks at an address over TCP or UDP, and prints who it is there.
fn asks(kind: &str, address: &str, port: u16) -> String {
    format!(
        "python3 -c \"import socket as s; c = s.socket(s.AF_INET, s.SOCK_{kind}); c.settimeout(1); \
         c.connect(('{address}', {port})); c.send(b'x\\n'); print(c.recv(99).decode())\""
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_published_port_leads_to_its_machine_and_to_nothing_else() {
    tokio::task::spawn_blocking(|| {
        let rt = tokio::runtime::Handle::current();
        let world = World::new();
        let mut site = Site::new();
        let (one, two) = (
            network("one", NetworkKind::Nat, "10.85.0.0/24"),
            network("two", NetworkKind::Nat, "10.85.0.0/24"),
        );
        let (tcp, udp) = (18_080 + (std::process::id() % 1000) as u16, 28_053);
        let ports: Vec<PublishedPort> = [format!("{tcp}:80/tcp"), format!("{udp}:53/udp")]
            .iter()
            .map(|p| p.parse().unwrap())
            .collect();
        let plain = [member(&one, "a", 0), member(&one, "b", 1), member(&two, "c", 0)];
        let mut members = plain.clone();
        members[0] = plain[0].clone().publishing(ports);
        site.has(&rt, &members);
        let [a, b, c] = [0, 1, 2].map(|n| site.plug(&members[n]));
        let _servers = [&a, &b, &c].map(Serves::at);
        let host = world.host.as_str();
        let asked = |out: Output| String::from_utf8(out.stdout).unwrap().trim().to_owned();
        let reached = |kind: &str, port: u16| {
            let out = world.run(&asks(kind, host, port));
            out.status.success().then(|| asked(out))
        };
        // The machine sees who really asks.
        let me = Some(world.address.clone());
        assert_eq!((reached("STREAM", tcp), reached("DGRAM", udp)), (me.clone(), me.clone()));
        assert!(sh(&asks("STREAM", host, tcp)).status.success(), "the host itself reaches it");
        for (kind, port) in [("STREAM", 80), ("STREAM", 81), ("STREAM", udp), ("DGRAM", tcp)] {
            assert_eq!(reached(kind, port), None, "{kind} {port}");
        }
        // Whoever routes past the host's own address finds nothing, neither there nor in the network.
        let of = site.namespace(&members[0]);
        let inside = ok(&format!("ip -n {of} -4 -o addr show dev up0"));
        let inside = inside.split_whitespace().nth(3).unwrap().split('/').next().unwrap().to_owned();
        for (range, address) in [("100.127.0.0/16", inside.as_str()), ("10.85.0.0/24", "10.85.0.2")] {
            assert!(world.run(&format!("ip route add {range} via {host}")).status.success());
            for port in [tcp, 80] {
                let tried = world.run(&asks("STREAM", address, port));
                assert!(!tried.status.success(), "{address}:{port} answers");
            }
        }
        // It is no way from one machine to another.
        for guest in [&a, &b, &c] {
            let tried = guest.run(&asks("STREAM", host, tcp));
            assert!(!tried.status.success(), "a guest reaches what the host publishes");
            assert!(guest.run(&fetch(&world.address)).status.success(), "the world is there");
        }

        // A new daemon changes nothing; what somebody broke it puts right.
        let table = format!("godwit_{}_ports", of.split('-').nth(1).unwrap());
        site.networks = Networks::of(site.dir.path());
        for broken in [
            format!("nft flush table inet {table}"),
            format!("nft delete table inet {table}"),
            format!("ip netns exec {of} nft flush chain inet godwit prerouting"),
        ] {
            site.has(&rt, &members);
            assert_eq!(reached("STREAM", tcp), me, "before: {broken}");
            ok(&broken);
            assert_eq!(reached("STREAM", tcp), None, "{broken}");
        }
        site.has(&rt, &members);

        // Taken away: also from who is in the midst of it.
        let py = format!(
            "import socket as s\nc = s.create_connection(('{host}', {tcp})); c.settimeout(2); f = c.makefile('rw')\n\
             while True:\n print('x', file=f, flush=True); print(f.readline(), end='', flush=True); input()"
        );
        let mut talks = Command::new("ip")
            .args(["netns", "exec", world.namespace(), "python3", "-c", &py])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let mut heard = std::io::BufReader::new(talks.stdout.take().unwrap());
        let mut says = talks.stdin.take().unwrap();
        let mut next = || {
            let mut line = String::new();
            std::io::BufRead::read_line(&mut heard, &mut line).unwrap();
            line
        };
        assert_eq!(next().trim(), world.address);
        std::io::Write::write_all(&mut says, b"\n").unwrap();
        assert_eq!(next().trim(), world.address, "it goes on");
        site.has(&rt, &plain);
        std::io::Write::write_all(&mut says, b"\n").unwrap();
        assert_eq!(next(), "", "it has ended");
        assert!(!talks.wait().unwrap().success());
        assert_eq!((reached("STREAM", tcp), reached("DGRAM", udp)), (None, None));
        assert!(!ok("nft list tables").contains(&table), "nothing is left");
        assert!(a.run(&fetch(&world.address)).status.success(), "the world is there");
    })
    .await
    .unwrap();
}
