//! Packets that lie: dropped, counted under the right reason, and visible.

use std::{
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    time::Duration,
};

use anyhow::{Result, ensure};
use etherparse::PacketBuilder;
use raven_common::Verdict;
use raven_tests::{Namespace, Node, eventually, privileged, proof};

use crate::Running;

/// A VXLAN packet (network 200) from where this runs to `node`, with an inner IPv4/UDP packet of these addresses. The outer
/// headers are the kernel's; the payload is ours, byte for byte.
fn overlay(from: &Namespace, node: &Node, source: Ipv4Addr, destination: Ipv4Addr) -> Result<()> {
    let builder = PacketBuilder::ethernet2([2, b'r', b'a', b'v', b'e', b's'], [2, b'r', b'a', b'v', b'e', b'n']);
    let builder = builder.ipv4(source.octets(), destination.octets(), 64).udp(1, 9);
    let mut payload = vec![0x08, 0, 0, 0, 0, 0, 200, 0];
    builder.write(&mut payload, b"forged")?;
    let target = SocketAddr::from((node.lan_v4, 4472));
    from.within(move || UdpSocket::bind("0.0.0.0:0").and_then(|socket| socket.send_to(&payload, target)))??;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn forged_packets_are_dropped_counted_and_shown() {
    if !privileged("forged_packets_are_dropped_counted_and_shown") {
        return;
    }
    let running = Running::start().await.expect("the lab starts");
    let lab = &running.lab;
    let (gateway, ordinary) = (lab.node("x-a"), lab.node("x-b"));
    let router = &lab.pool("edge-x").router;
    let (own, mate, remote) = (lab.pod("x-b").v4, lab.pod("x-a").v4, lab.pod("y-b").v4);
    let stories = [
        ("an overlay packet from outside the pool", router, gateway, own, Verdict::DropOuterNotInPool),
        ("another node's pod as its own", &ordinary.ns, gateway, mate, Verdict::DropSpoofedInner),
        ("another pool's pod as its own", &ordinary.ns, gateway, remote, Verdict::DropSpoofedInner),
        ("an overlay packet from outside to an ordinary node", router, ordinary, remote, Verdict::DropOuterNotInPool),
    ];
    for (what, from, to, source, verdict) in stories {
        let before = running.check(proof::counters(to));
        // Sent again until it shows: of drops that follow each other within 10 ms only the first is sampled.
        let dropped = eventually(Duration::from_secs(10), what, || async {
            overlay(from, to, source, lab.pod("cloud-a").v4)?;
            let after = proof::counters(to)?;
            ensure!(proof::grown(&before, &after, verdict) > 0, "{} has not moved: {before:?} {after:?}", verdict.as_str());
            let shown = proof::http(&to.ns, "[::1]:10265", "/drops").await?;
            ensure!(shown.contains(verdict.as_str()), "it is not shown: {shown}");
            Ok(())
        });
        running.check(dropped.await);
    }
    // On its way out, where the cause is: a process that makes up another pod's address.
    let before = running.check(proof::counters(ordinary));
    running.check(lab.pod("x-b").ns.sh("ip addr add 10.99.9.9/32 dev eth0; ping -c1 -W1 -I 10.99.9.9 10.244.1.10 || true"));
    let after = running.check(proof::counters(ordinary));
    assert!(proof::grown(&before, &after, Verdict::DropSourceNotMine) > 0, "{after:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_node_that_sends_another_pools_addresses_gets_nothing_through() {
    if !privileged("a_gateway_node_that_sends_another_pools_addresses_gets_nothing_through") {
        return;
    }
    let running = Running::start().await.expect("the lab starts");
    // By the embedded engine here; the kernel's WireGuard: `tests/vm`.
    let seen = proof::lying_peer(&running.lab, false).await;
    println!("lying peer: {}", running.check(seen));
}
