//! Tests of forged packets: they are dropped, counted under the right reason, and listed.

use anyhow::{Result, ensure};
use raven_tests::{proof, require_root};

use crate::Running;

#[tokio::test(flavor = "multi_thread")]
async fn forged_packets_are_dropped_counted_and_listed() {
    require_root!();
    let running = Running::start().await.expect("start the lab");
    let seen = proof::forged(&running.lab, false).await;
    println!("forged: {}", running.check(seen));
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_cannot_send_overlay_packets() {
    require_root!();
    let running = Running::start().await.expect("start the lab");
    pods_cannot_send(&running);
}

/// A pod of edge-x tries it with a node's address: by its CNI's masquerading, and by writing it itself.
pub(crate) fn pods_cannot_send(running: &Running) {
    let lab = &running.lab;
    let (gateway, member) = (lab.node("x-a"), lab.node("x-b"));
    let (attacker, victim, cloud) = (lab.pod("x-a"), lab.pod("x-b"), lab.pod("cloud-b"));
    let dropped = |chain: &str| -> Result<bool> {
        let listed = gateway.ns.run("nft", &["list", "chain", "inet", "raven", chain])?;
        ensure!(listed.contains("counter"), "no rule: {listed}");
        Ok(!listed.contains("packets 0 "))
    };
    // The CNI gives the pod's packet the gateway node's address, from which the member takes packets of other pools.
    let before = running.check(proof::counters(member));
    running.check(proof::forged_overlay(&attacker.ns, member, cloud.v4, victim.v4));
    assert!(running.check(dropped("masqueraded")));
    // The pod writes a member's address, from which its gateway node takes packets of that member's pods.
    let address = member.addresses()[0];
    running.check(attacker.ns.sh(&format!("ip addr add {address} dev lo")));
    let gateway_before = running.check(proof::counters(gateway));
    let forged = proof::forged_overlay_from(&attacker.ns, address, gateway, victim.v4, cloud.v4);
    running.check(forged);
    assert!(running.check(dropped("spoofed")));
    // Neither has reached a program of Raven, not even to be dropped.
    for (node, before) in [(member, before), (gateway, gateway_before)] {
        let after = running.check(proof::counters(node));
        assert_eq!(before, after, "{}", node.name);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn peer_cannot_send_from_addresses_of_another_pool() {
    require_root!();
    let running = Running::start().await.expect("start the lab");
    // The embedded engine; `tests/vm` runs the check with the kernel's WireGuard.
    let seen = proof::rejects_foreign_sources(&running.lab, false).await;
    println!("foreign sources: {}", running.check(seen));
}
