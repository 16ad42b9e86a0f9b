//! Another version's programs take over in place: under traffic, without a gap, and back.

use std::collections::BTreeSet;

use raven_tests::{Node, agent::ebpf_object, privileged, proof};

use crate::Running;

impl Running {
    /// Tags of the programs in the pinned links of all nodes: what the kernel knows a program's instructions by.
    fn tags(&self) -> BTreeSet<String> {
        let of = |node: &Node| {
            // The ids of the links' programs, then each one's tag.
            let script = "for link in /sys/fs/bpf/raven/v1/links/*; do id=$(bpftool link show pinned $link | sed -n 's/.* prog \\([0-9]*\\).*/\\1/p'); \
                          bpftool prog show id $id | sed -n 's/.* name \\([a-z_]*\\) *tag \\([0-9a-f]*\\).*/\\1 \\2/p'; done";
            self.check(node.ns.sh(script)).lines().map(|line| format!("{} {line}", node.name)).collect::<Vec<_>>()
        };
        self.lab.nodes.iter().flat_map(of).collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn other_programs_take_over_under_traffic_and_no_packet_is_lost() {
    if !privileged("other_programs_take_over_under_traffic_and_no_packet_is_lost") {
        return;
    }
    let mut running = Running::start().await.expect("the lab starts");
    let ours = running.tags();
    assert!(ours.len() > 10, "every node has programs: {ours:?}");
    // The same programs, built to log: other instructions, of which the kernel makes other tags.
    let tracing = ebpf_object("ebpf-trace", "raven").expect("the object that logs is built");
    for agent in &mut running.agents {
        agent.arguments.extend(["--ebpf-object".to_owned(), tracing.display().to_string()]);
    }
    let taken = proof::restart(&running.lab, &mut running.agents, "x-b", "y-b", 0).await;
    println!("upgrade: {}", running.check(taken));
    let theirs = running.tags();
    assert_eq!(theirs.len(), ours.len());
    let same: Vec<_> = ours.intersection(&theirs).filter(|name| !name.contains("kubelet_lookup")).collect();
    // XDP counts and samples, and logs nothing.
    assert!(same.iter().all(|name| name.contains("uplink_xdp")), "replaced but for {same:?}");
    // What they log arrives in the agent's log (aya-log).
    let log = running.agent("x-a").process.output().expect("the agent has a log");
    assert!(log.contains("verdict ") && log.contains(" gateway "), "the programs' lines are in the log");

    for agent in &mut running.agents {
        agent.arguments.truncate(agent.arguments.len() - 2);
    }
    let taken = proof::restart(&running.lab, &mut running.agents, "y-b", "cloud-b", 1).await;
    println!("upgrade: {}", running.check(taken));
    assert_eq!(running.tags(), ours, "all are replaced again");
}
