//! Other owners of the same hooks: they cost at most the fast tier, and never their own work.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use aya::{
    Ebpf, EbpfLoader,
    programs::{SchedClassifier, TcAttachType, Xdp, XdpMode},
};
use raven_common::Verdict;
use raven_tests::{Namespace, eventually, privileged, proof};

use crate::Running;

/// Programs of somebody else on the uplink, which let everything pass: ours, of which no map says anything.
fn foreign(ns: &Namespace, xdp: bool) -> Result<Ebpf> {
    ns.within(move || -> Result<Ebpf> {
        let mut ebpf = EbpfLoader::new().load(raven_agent::bpf::object())?;
        if xdp {
            let program: &mut Xdp = ebpf.program_mut("uplink_xdp").context("the object has it")?.try_into()?;
            program.load()?;
            program.attach("eth0", XdpMode::Driver)?;
        } else {
            let program: &mut SchedClassifier = ebpf.program_mut("uplink_ingress").context("the object has it")?.try_into()?;
            program.load()?;
            program.attach("eth0", TcAttachType::Ingress)?;
        }
        Ok(ebpf)
    })?
}

#[tokio::test(flavor = "multi_thread")]
async fn an_xdp_program_of_somebody_else_costs_the_fast_tier_and_nothing_else() {
    if !privileged("an_xdp_program_of_somebody_else_costs_the_fast_tier_and_nothing_else") {
        return;
    }
    let mut running = Running::start().await.expect("the lab starts");
    let node = running.lab.node("x-a").clone();
    running.agent("x-a").kill().expect("the agent dies");
    // The slot is somebody's before the agent comes: as on a node where Cilium was first.
    running.check(node.ns.sh("rm /sys/fs/bpf/raven/v1/links/uplink_xdp-*"));
    let taken = eventually(Duration::from_secs(5), "the slot is free for somebody else", || async { foreign(&node.ns, true) });
    let other = running.check(taken.await);
    running.agent("x-a").restart().expect("the agent starts");
    running.says("the fallback tier, and why", |status, message| status == "True" && message.contains("not the fastest tier")).await;
    let before = running.check(proof::counters(&node));
    let (edge, cloud) = (running.lab.pool("edge-x").clone(), running.lab.pool("cloud").clone());
    for family in 0..2 {
        running.check(proof::reach(&running.lab, &cloud, &edge, family).await);
    }
    let after = running.check(proof::counters(&node));
    assert!(proof::grown(&before, &after, Verdict::ToTunnel) > 0, "the fallback tier carried it: {after:?}");
    assert_eq!(proof::grown(&before, &after, Verdict::ToTunnelFast), 0);
    drop(other);
    // The slot is free again: the next run takes it, without a restart.
    running.says("the fast tier", |status, message| status == "True" && !message.contains("not the fastest tier")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tc_program_of_somebody_else_goes_on_beside_ours() {
    if !privileged("a_tc_program_of_somebody_else_goes_on_beside_ours") {
        return;
    }
    let running = Running::start().await.expect("the lab starts");
    let node = running.lab.node("x-a").clone();
    let _other = running.check(foreign(&node.ns, false));
    let before = running.check(proof::all_counters(&running.lab));
    running.check(proof::bulk(&running.lab, "x-b", "cloud-b", 0, 5_000_000).await);
    let after = running.check(proof::counters(&node));
    let fast = proof::grown(&before["x-a"], &after, Verdict::ToTunnelFast);
    let result: Result<()> = (|| {
        ensure!(fast > 1000, "only {fast} packets took the fast tier");
        Ok(())
    })();
    running.check(result);
}
