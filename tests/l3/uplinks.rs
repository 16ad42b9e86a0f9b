//! Tests of nodes whose network is not one device with one address: the overlay uses the device and the source by which
//! the pool's nodes know each other.

use std::time::Duration;

use anyhow::{Context, ensure};
use raven_agent::bpf::probe as probe_kernel;
use raven_common::Verdict;
use raven_tests::{Lab, PoolSpec, eventually, probe, proof, require_root};

use crate::Running;

impl Running {
    fn script(&self, node: &str, script: &str) {
        self.check(self.lab.node(node).ns.sh(&format!("set -e\n{script}")));
    }

    /// Restarts the agents of edge-x, and checks it with the cloud in both directions.
    async fn edge_is_connected(&mut self) {
        for name in self.lab.pool("edge-x").spec.nodes.clone() {
            self.agent(&name).restart().expect("restart the agent");
            let ready = proof::ready(self.agent(&name)).await;
            self.check(ready);
        }
        let (cloud, edge) = (self.lab.pool("cloud").clone(), self.lab.pool("edge-x").clone());
        self.check(proof::reach(&self.lab, &cloud, &edge, 0).await);
    }

    /// Which of x-a's devices have the program `uplink_xdp`, and which `uplink_ingress`.
    fn programs_of_gateway(&self) -> [Vec<String>; 2] {
        let pinned = |program: &str| {
            let links = format!(
                "cd /sys/class/net; for dev in eth*; do test ! -e /sys/fs/bpf/raven/v1/links/{program}-$(cat $dev/ifindex) || echo $dev; done"
            );
            let devices = self.check(self.lab.node("x-a").ns.sh(&links));
            devices.lines().map(str::to_owned).collect()
        };
        ["uplink_xdp", "uplink_ingress"].map(pinned)
    }

    /// Puts x-b behind x-a: a cable between their devices eth1, and x-a answers for x-b on its LAN.
    fn put_behind_gateway_node(&self) {
        let (a, b) = (self.lab.node("x-a"), self.lab.node("x-b"));
        let (lan_a, lan_b) = (a.lan_v4, b.lan_v4);
        self.check(a.ns.ip(&format!("link add eth1 type veth peer name eth1 netns {}", b.ns.name)));
        self.script(
            "x-b",
            &format!(
                "ip addr del {lan_b}/24 dev eth0; ip link set eth0 down
                 ip link set eth1 up; ip addr add {lan_b}/32 dev eth1
                 ip route add {lan_a}/32 dev eth1; ip route replace default via {lan_a} dev eth1"
            ),
        );
        self.script(
            "x-a",
            &format!(
                "ip link set eth1 up; ip route add {lan_b}/32 dev eth1
                 sysctl -qw net.ipv4.conf.eth0.proxy_arp=1 net.ipv4.conf.eth1.proxy_arp=1"
            ),
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn overlay_has_the_source_that_the_pool_knows() {
    require_root!();
    let release = probe_kernel::release().expect("the kernel's release");
    if !release.has_tunnel_source() {
        return println!(
            "SKIPPED overlay_has_the_source_that_the_pool_knows: Linux {release} does not allow to set it"
        );
    }
    let mut running = Running::start().await.expect("start the lab");
    for (name, other) in [("x-a", "10.1.0.77"), ("x-b", "10.1.0.78")] {
        running.script(
            name,
            &format!("ip addr add {other}/24 dev eth0; ip route change 10.1.0.0/24 dev eth0 src {other}"),
        );
    }
    running.edge_is_connected().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn address_on_the_loopback_device_uses_the_device_of_the_lan() {
    require_root!();
    let mut running = Running::start().await.expect("start the lab");
    for (name, other) in [("x-a", "10.1.0.77"), ("x-b", "10.1.0.78")] {
        let lan = running.lab.node(name).lan_v4;
        running.script(
            name,
            &format!(
                "ip addr del {lan}/24 dev eth0; ip addr add {other}/24 dev eth0; ip addr add {lan}/32 dev lo
                 ip route replace default via 10.1.0.1 dev eth0 src {lan}"
            ),
        );
    }
    running.edge_is_connected().await;
    for name in ["x-a", "x-b"] {
        let overlay = running.check(running.lab.node(name).ns.run("ip", &["link", "show", "raven0"]));
        assert!(overlay.contains("mtu 1450"), "{name}: the overlay's MTU follows eth0's 1500: {overlay}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn gateway_node_is_the_router_of_its_site() {
    require_root!();
    let mut running = Running::start().await.expect("start the lab");
    running.put_behind_gateway_node();
    running.edge_is_connected().await;
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    assert_eq!(running.programs_of_gateway(), [names(&["eth1"]), names(&["eth0", "eth1"])]);
    // Not WireGuard, to the tunnel's port, from outside the site.
    let gateway = running.lab.node("x-a");
    let before = running.check(proof::counters(gateway));
    let garbage = format!("for n in 1 2 3; do echo garbage > /dev/udp/{}/4500; done", gateway.lan_v4);
    running.check(running.lab.pool("edge-x").router.run("bash", &["-c", &garbage]));
    let dropped = || async {
        let after = proof::counters(gateway)?;
        let packets = proof::increase(&before, &after, Verdict::DropNotWireguard);
        ensure!(packets == 3, "{packets} packets are dropped: {after:?}");
        Ok(())
    };
    running.check(eventually(Duration::from_secs(5), "the guard drops them", dropped).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn members_behind_several_devices_are_reached() {
    require_root!();
    let mut pools = PoolSpec::three();
    pools[1].nodes.push("x-c".to_owned());
    let mut running = Running::of(Lab::builder().pools(pools)).await.expect("start the lab");
    running.put_behind_gateway_node();
    // x-c expects x-b on its LAN, where x-a answers for it.
    running.script("x-c", "ip neigh flush dev eth0");
    running.edge_is_connected().await;
    let both = ["eth0", "eth1"].map(str::to_owned).to_vec();
    assert_eq!(running.programs_of_gateway(), [both.clone(), both]);
    let before = running.check(proof::counters(running.lab.node("x-a")));
    for member in ["x-b", "x-c"] {
        running.check(proof::bulk(&running.lab, member, "cloud-b", 0, 5_000_000).await);
    }
    let after = running.check(proof::counters(running.lab.node("x-a")));
    let [fast, slow] =
        [Verdict::ToTunnelFast, Verdict::ToTunnel].map(|verdict| proof::increase(&before, &after, verdict));
    assert!(fast > 100 && fast > 10 * slow, "{fast} packets by XDP, {slow} not");
}

#[tokio::test(flavor = "multi_thread")]
async fn recreated_uplink_is_used_at_once() {
    require_root!();
    let running = Running::start().await.expect("start the lab");
    let lan = running.lab.node("x-a").lan_v4;
    let (from, to) = (running.lab.pod("cloud-b"), running.lab.pod("x-b"));
    let bridge = format!(
        "ip link add br0 address $(cat /sys/class/net/eth0/address) type bridge; ip link set br0 up
         ip link set eth0 master br0; ip addr add {lan}/24 dev br0
         ip route replace default via 10.1.0.1 dev br0"
    );
    // A bridge instead of the device with the address, then another bridge.
    for before in [format!("ip addr del {lan}/24 dev eth0"), "ip link del br0".to_owned()] {
        running.script("x-a", &format!("{before}\n{bridge}"));
        let answers = || async { probe::ping(&from.ns, to.v4.into()).await?.context("no answer") };
        let connected = eventually(Duration::from_secs(3), "pods behind the new uplink answer", answers).await;
        running.check(connected);
    }
}
