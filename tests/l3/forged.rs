//! Packets that lie: dropped, counted under the right reason, and visible.

use raven_tests::{privileged, proof};

use crate::Running;

#[tokio::test(flavor = "multi_thread")]
async fn forged_packets_are_dropped_counted_and_shown() {
    if !privileged("forged_packets_are_dropped_counted_and_shown") {
        return;
    }
    let running = Running::start().await.expect("the lab starts");
    let seen = proof::forged(&running.lab, false).await;
    println!("forged: {}", running.check(seen));
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
