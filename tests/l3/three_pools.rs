//! Pods of three pools talk, by the redirect programs and encrypted, through restarts.

use raven_tests::{privileged, proof};

use crate::Running;

/// As the issue has it: 200 MB.
const BULK: u64 = 200_000_000;

#[tokio::test(flavor = "multi_thread")]
async fn pods_of_three_pools_talk_in_both_families_by_the_redirect_programs() {
    if !privileged("pods_of_three_pools_talk_in_both_families_by_the_redirect_programs") {
        return;
    }
    let running = Running::start().await.expect("the lab starts");
    let lab = &running.lab;
    let before = running.check(proof::all_counters(lab));
    running.check(proof::watch_netfilter(lab));
    for family in 0..2 {
        running.check(proof::bulk(lab, "cloud-b", "x-b", family, BULK / 4).await);
        running.check(proof::bulk(lab, "x-b", "y-b", family, BULK / 4).await);
    }
    // Every gateway node carried ordinary nodes' packets both ways, and nothing of it went any other way.
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
async fn two_hundred_megabytes_arrive_bit_for_bit() {
    if !privileged("two_hundred_megabytes_arrive_bit_for_bit") {
        return;
    }
    let running = Running::start().await.expect("the lab starts");
    running.check(proof::bulk(&running.lab, "x-b", "cloud-b", 0, BULK).await);
    running.check(proof::bulk(&running.lab, "x-b", "y-b", 1, BULK).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_fit_brings_the_right_mtu_back() {
    if !privileged("what_does_not_fit_brings_the_right_mtu_back") {
        return;
    }
    let running = Running::start().await.expect("the lab starts");
    for (from, to) in [("cloud-b", "y-b"), ("x-b", "y-b"), ("x-a", "cloud-a")] {
        running.check(proof::mtu(&running.lab, from, to).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_agents_come_back_and_no_packet_is_lost() {
    if !privileged("killed_agents_come_back_and_no_packet_is_lost") {
        return;
    }
    let mut running = Running::start().await.expect("the lab starts");
    for family in 0..2 {
        let result = proof::restart(&running.lab, &mut running.agents, "x-b", "y-b", family).await;
        running.check(result);
    }
}
