//! Other owners of the same hooks: they cost at most the fast tier, and never their own work.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use aya::{
    Ebpf, EbpfLoader,
    programs::{
        LinkOrder, SchedClassifier, TcAttachType, Xdp, XdpMode,
        tc::{NlOptions, TcAttachOptions, TcHandle, qdisc_add_clsact},
    },
};
use raven_common::Verdict;
use raven_tests::{Namespace, Node, agent::ebpf_object, eventually, privileged, proof};

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
    running.carried_by(&node, Verdict::ToTunnel).await;
    drop(other);
    // The slot is free again: the next run takes it, without a restart.
    running.says("the fast tier", FAST).await;
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

/// A program at TC ingress of a device that says the last word of every packet.
fn last_word(ns: &Namespace, device: &'static str, way: impl FnOnce() -> TcAttachOptions + Send + 'static) -> Result<Ebpf> {
    let object = ebpf_object("ebpf", "raven-bench")?;
    ns.within(move || -> Result<Ebpf> {
        let mut ebpf = EbpfLoader::new().load_file(object)?;
        let program: &mut SchedClassifier = ebpf.program_mut("last_word").context("the object has it")?.try_into()?;
        program.load()?;
        let _ = qdisc_add_clsact(device);
        program.attach_with_options(device, TcAttachType::Ingress, way())?;
        Ok(ebpf)
    })?
}

/// As Cilium has its filter: priority 1.
fn filter(handle: u16) -> TcAttachOptions {
    TcAttachOptions::Netlink(NlOptions { priority: 1, handle: TcHandle::new(0, handle), classid: None })
}

impl Running {
    /// Packets of x's ordinary nodes enter the tunnel by the fallback tier, or by the fast one; and all reach each other.
    async fn carried_by(&self, node: &Node, into: Verdict) {
        let before = self.check(proof::counters(node));
        let (edge, cloud) = (self.lab.pool("edge-x").clone(), self.lab.pool("cloud").clone());
        for family in 0..2 {
            self.check(proof::reach(&self.lab, &cloud, &edge, family).await);
        }
        let after = self.check(proof::counters(node));
        for tier in [Verdict::ToTunnel, Verdict::ToTunnelFast] {
            assert_eq!(proof::grown(&before, &after, tier) > 0, tier == into, "{}: {after:?}", tier.as_str());
        }
    }

    /// Something changes that the agent is told of, so that it looks at once and not within 30 s.
    fn nudge(&self, node: &Node) {
        self.check(node.ns.sh("ip rule add pref 150 lookup main; ip rule del pref 150"));
    }
}

const FAST: fn(&str, &str) -> bool = |status, message| status == "True" && !message.contains("not the fastest tier");
const OVERTAKEN: fn(&str, &str) -> bool = |status, message| {
    status == "True" && message.contains("not the fastest tier") && message.contains("last_word is asked before uplink_ingress")
};

#[tokio::test(flavor = "multi_thread")]
async fn a_tc_program_with_the_last_word_before_ours_costs_the_fast_tier_and_nothing_else() {
    if !privileged("a_tc_program_with_the_last_word_before_ours_costs_the_fast_tier_and_nothing_else") {
        return;
    }
    let running = Running::start().await.expect("the lab starts");
    let node = running.lab.node("x-a").clone();
    // Behind ours, as Cilium attaches: nothing changes.
    let behind = running.check(last_word(&node.ns, "eth0", || TcAttachOptions::TcxOrder(LinkOrder::last())));
    running.carried_by(&node, Verdict::ToTunnelFast).await;
    drop(behind);
    let before = running.check(last_word(&node.ns, "eth0", || TcAttachOptions::TcxOrder(LinkOrder::first())));
    running.nudge(&node);
    running.says("who is asked before ours, and what that costs", OVERTAKEN).await;
    running.carried_by(&node, Verdict::ToTunnel).await;
    drop(before);
    running.nudge(&node);
    running.says("the fast tier", FAST).await;
    running.carried_by(&node, Verdict::ToTunnelFast).await;
    // On our own device nobody has any business: packets would pass that nobody has looked at.
    let intruder = running.check(last_word(&node.ns, "raven0", || TcAttachOptions::TcxOrder(LinkOrder::first())));
    running.nudge(&node);
    let named = |status: &str, message: &str| status == "False" && message.contains("last_word is asked before overlay_ingress");
    running.says("who is on our device", named).await;
    drop(intruder);
    running.nudge(&node);
    running.says("all is well again", FAST).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn filters_of_one_priority_are_put_in_order_or_said_to_be_in_the_way() {
    if !privileged("filters_of_one_priority_are_put_in_order_or_said_to_be_in_the_way") {
        return;
    }
    let mut running = Running::start().await.expect("the lab starts");
    let node = running.lab.node("x-a").clone();
    running.agent("x-a").kill().expect("the agent dies");
    // Somebody was there first, with a filter at the first priority: ours comes before it all the same.
    let first = running.check(last_word(&node.ns, "eth0", || filter(1)));
    running.agent("x-a").arguments.extend(["--tc-attach".to_owned(), "clsact".to_owned()]);
    running.agent("x-a").restart().expect("the agent starts");
    // Its own word: until it has written its status, the GatewayNode tells what the one before it said.
    let ready = proof::ready(running.agent("x-a")).await;
    running.check(ready);
    let moved = eventually(Duration::from_secs(20), "the filter took over from the link", || async {
        let links = node.ns.sh("ls /sys/fs/bpf/raven/v1/links")?;
        ensure!(!links.contains("uplink_ingress"), "{links}");
        Ok(())
    });
    running.check(moved.await);
    running.says("the fast tier", FAST).await;
    running.carried_by(&node, Verdict::ToTunnelFast).await;
    // Somebody comes later, and is asked first: that is said, and the fallback tier does not need the uplink's hook.
    let second = running.check(last_word(&node.ns, "eth0", || filter(2)));
    running.nudge(&node);
    running.says("who is asked before ours, and what that costs", OVERTAKEN).await;
    running.carried_by(&node, Verdict::ToTunnel).await;
    running.check(node.ns.sh("tc filter del dev eth0 ingress pref 1 handle 2 bpf"));
    running.nudge(&node);
    running.says("the fast tier", FAST).await;
    // A filter would be taken off in the namespace of whoever drops it, and that is this one: the lab's end takes it.
    std::mem::forget((first, second));
}
