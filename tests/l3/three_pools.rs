//! Tests of the basic function: pods of three pools reach each other, by the redirect programs and encrypted, and
//! also while agents restart.

use raven_tests::{probe, proof, require_root};

use crate::Running;

/// Size of the large transfers in bytes.
const BULK: u64 = 200_000_000;

#[tokio::test(flavor = "multi_thread")]
async fn pods_of_three_pools_reach_each_other_by_redirect() {
    require_root!();
    let running = Running::start().await.expect("start the lab");
    let lab = &running.lab;
    let before = running.check(proof::all_counters(lab));
    running.check(proof::watch_netfilter(lab));
    for family in 0..2 {
        // Each pool sends data and receives data: how many acknowledgements a transfer takes is TCP's choice.
        for (from, to) in [("cloud-b", "x-b"), ("x-b", "y-b"), ("y-b", "cloud-b")] {
            running.check(proof::bulk(lab, from, to, family, BULK / 4).await);
        }
        let (from, to) = (lab.pod("x-b"), lab.pod("y-b"));
        running.check(probe::udp_runs(&from.ns, &to.ns, to.addresses()[family], 1200, 100).await);
    }
    // Every gateway node forwarded members' packets in both directions, only by the redirect programs.
    running.check(proof::redirected(lab, &before, 1000));
    let internet = running.check(proof::record(lab).await);
    for (a, b) in proof::pairs(lab) {
        for family in 0..2 {
            running.check(proof::reach(lab, &a, &b, family).await);
        }
    }
    running.check(proof::no_drops(lab, &before));
    let internet = running.check(internet.stop().await);
    running.check(proof::encrypted(lab, &internet));
    running.check(proof::handshakes(lab).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn large_transfer_arrives_unchanged() {
    require_root!();
    let running = Running::start().await.expect("start the lab");
    running.check(proof::bulk(&running.lab, "x-b", "cloud-b", 0, BULK).await);
    running.check(proof::bulk(&running.lab, "x-b", "y-b", 1, BULK).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn oversized_packets_are_answered_with_the_mtu() {
    require_root!();
    let running = Running::start().await.expect("start the lab");
    for (from, to) in [("cloud-b", "y-b"), ("x-b", "y-b"), ("x-a", "cloud-a")] {
        running.check(proof::mtu(&running.lab, from, to).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn agent_restart_loses_no_packet() {
    require_root!();
    let mut running = Running::start().await.expect("start the lab");
    for family in 0..2 {
        let result = proof::restart(&running.lab, &mut running.agents, "x-b", "y-b", family).await;
        running.check(result);
    }
}
