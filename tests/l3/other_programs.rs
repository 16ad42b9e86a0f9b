//! Tests of other programs on the same hooks: at most they disable the fast tier, and they keep working.

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
use raven_tests::{Namespace, Node, agent::ebpf_object, eventually, proof, require_root};

use crate::Running;

/// Attaches programs of another owner to the uplink that pass every packet: Raven's own programs with empty maps.
fn foreign(ns: &Namespace, xdp: bool) -> Result<Ebpf> {
    ns.within(move || -> Result<Ebpf> {
        let mut ebpf = EbpfLoader::new().load(raven_agent::bpf::object())?;
        if xdp {
            let program: &mut Xdp =
                ebpf.program_mut("uplink_xdp").context("the object has no program uplink_xdp")?.try_into()?;
            program.load()?;
            program.attach("eth0", XdpMode::Driver)?;
        } else {
            let program: &mut SchedClassifier =
                ebpf.program_mut("uplink_ingress").context("the object has no program uplink_ingress")?.try_into()?;
            program.load()?;
            program.attach("eth0", TcAttachType::Ingress)?;
        }
        Ok(ebpf)
    })?
}

#[tokio::test(flavor = "multi_thread")]
async fn foreign_xdp_program_disables_only_the_fast_tier() {
    require_root!();
    let mut running = Running::start().await.expect("start the lab");
    let node = running.lab.node("x-a").clone();
    running.agent("x-a").kill().expect("kill the agent");
    // The other program is attached before the agent starts, as on a node where Cilium was installed first.
    running.check(node.ns.sh("rm /sys/fs/bpf/raven/v1/links/uplink_xdp-*"));
    let taken =
        eventually(Duration::from_secs(5), "the other program is attached", || async { foreign(&node.ns, true) });
    let other = running.check(taken.await);
    running.agent("x-a").restart().expect("restart the agent");
    running
        .until_ready("the fallback tier with its reason", |status, message| {
            status == "True" && message.contains("not the fastest tier")
        })
        .await;
    running.carried_by(&node, Verdict::ToTunnel).await;
    drop(other);
    // The agent's next run attaches its program to the free slot, without a restart.
    running.until_ready("the fast tier", FAST).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn foreign_tc_program_can_coexist() {
    require_root!();
    let running = Running::start().await.expect("start the lab");
    let node = running.lab.node("x-a").clone();
    let _other = running.check(foreign(&node.ns, false));
    let before = running.check(proof::all_counters(&running.lab));
    running.check(proof::bulk(&running.lab, "x-b", "cloud-b", 0, 5_000_000).await);
    let after = running.check(proof::counters(&node));
    let fast = proof::increase(&before["x-a"], &after, Verdict::ToTunnelFast);
    let result: Result<()> = (|| {
        ensure!(fast > 1000, "only {fast} packets took the fast tier");
        Ok(())
    })();
    running.check(result);
}

/// Attaches a program to TC ingress of a device that ends the chain for every packet.
fn last_word(
    ns: &Namespace,
    device: &'static str,
    options: impl FnOnce() -> TcAttachOptions + Send + 'static,
) -> Result<Ebpf> {
    let object = ebpf_object("ebpf", "raven-bench")?;
    ns.within(move || -> Result<Ebpf> {
        let mut ebpf = EbpfLoader::new().load_file(object)?;
        let program: &mut SchedClassifier =
            ebpf.program_mut("last_word").context("the object has no program last_word")?.try_into()?;
        program.load()?;
        let _ = qdisc_add_clsact(device);
        program.attach_with_options(device, TcAttachType::Ingress, options())?;
        Ok(ebpf)
    })?
}

/// Returns the options of a filter with priority 1, which Cilium uses.
fn filter(handle: u16) -> TcAttachOptions {
    TcAttachOptions::Netlink(NlOptions { priority: 1, handle: TcHandle::new(0, handle), classid: None })
}

impl Running {
    /// Checks that packets of x's members enter the tunnel by the given tier, and that the pools reach each other.
    async fn carried_by(&self, node: &Node, into: Verdict) {
        let before = self.check(proof::counters(node));
        let (edge, cloud) = (self.lab.pool("edge-x").clone(), self.lab.pool("cloud").clone());
        for family in 0..2 {
            self.check(proof::reach(&self.lab, &cloud, &edge, family).await);
        }
        let after = self.check(proof::counters(node));
        for tier in [Verdict::ToTunnel, Verdict::ToTunnelFast] {
            assert_eq!(proof::increase(&before, &after, tier) > 0, tier == into, "{}: {after:?}", tier.as_str());
        }
    }

    /// Triggers a reconcile run of the agent, which otherwise takes up to 30 s.
    fn trigger_run(&self, node: &Node) {
        self.check(node.ns.sh("ip rule add pref 150 lookup main; ip rule del pref 150"));
    }
}

const FAST: fn(&str, &str) -> bool = |status, message| status == "True" && !message.contains("not the fastest tier");
const BYPASSED: fn(&str, &str) -> bool = |status, message| {
    status == "True"
        && message.contains("not the fastest tier")
        && message.contains("last_word runs before uplink_ingress")
};

#[tokio::test(flavor = "multi_thread")]
async fn terminal_tc_program_in_front_disables_only_the_fast_tier() {
    require_root!();
    let running = Running::start().await.expect("start the lab");
    let node = running.lab.node("x-a").clone();
    // Behind Raven's program, as Cilium attaches: no effect.
    let behind = running.check(last_word(&node.ns, "eth0", || TcAttachOptions::TcxOrder(LinkOrder::last())));
    running.carried_by(&node, Verdict::ToTunnelFast).await;
    drop(behind);
    let before = running.check(last_word(&node.ns, "eth0", || TcAttachOptions::TcxOrder(LinkOrder::first())));
    running.trigger_run(&node);
    running.until_ready("the program in front with its effect", BYPASSED).await;
    running.carried_by(&node, Verdict::ToTunnel).await;
    drop(before);
    running.trigger_run(&node);
    running.until_ready("the fast tier", FAST).await;
    running.carried_by(&node, Verdict::ToTunnelFast).await;
    // On Raven's own device, another program in front would let packets pass unchecked.
    let intruder = running.check(last_word(&node.ns, "raven0", || TcAttachOptions::TcxOrder(LinkOrder::first())));
    running.trigger_run(&node);
    let named =
        |status: &str, message: &str| status == "False" && message.contains("last_word runs before overlay_ingress");
    running.until_ready("the program on Raven's device", named).await;
    drop(intruder);
    running.trigger_run(&node);
    running.until_ready("the fast tier", FAST).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn filters_of_equal_priority_are_ordered_or_reported() {
    require_root!();
    let mut running = Running::start().await.expect("start the lab");
    let node = running.lab.node("x-a").clone();
    running.agent("x-a").kill().expect("kill the agent");
    // Another filter with the first priority exists already: Raven's filter is placed in front of it.
    let first = running.check(last_word(&node.ns, "eth0", || filter(1)));
    running.agent("x-a").arguments.extend(["--tc-attach".to_owned(), "clsact".to_owned()]);
    running.agent("x-a").restart().expect("restart the agent");
    // Wait for this agent itself: until it has written its status, the GatewayNode shows that of the previous one.
    let ready = proof::ready(running.agent("x-a")).await;
    running.check(ready);
    let moved = eventually(Duration::from_secs(20), "the filter replaces the link", || async {
        let links = node.ns.sh("ls /sys/fs/bpf/raven/v1/links")?;
        ensure!(!links.contains("uplink_ingress"), "{links}");
        Ok(())
    });
    running.check(moved.await);
    running.until_ready("the fast tier", FAST).await;
    running.carried_by(&node, Verdict::ToTunnelFast).await;
    // A later filter is placed in front: that is reported, and the fallback tier does not need the uplink's hook.
    let second = running.check(last_word(&node.ns, "eth0", || filter(2)));
    running.trigger_run(&node);
    running.until_ready("the filter in front with its effect", BYPASSED).await;
    running.carried_by(&node, Verdict::ToTunnel).await;
    running.check(node.ns.sh("tc filter del dev eth0 ingress pref 1 handle 2 bpf"));
    running.trigger_run(&node);
    running.until_ready("the fast tier", FAST).await;
    // Dropping a filter detaches it in the namespace of the current thread, which is not the node's. The
    // lab's end removes it.
    std::mem::forget((first, second));
}
