//! Tests of the election of gateway nodes.

use anyhow::ensure;
use k8s_openapi::api::core::v1::{ConfigMap, Node};
use kube::Api;
use kube::api::{DeleteParams, PostParams};
use raven_api::LABEL_GATEWAY;
use raven_tests::test_name;
use serde_json::json;

use crate::fixture::{elects, has_condition, nodes, run, status};

#[tokio::test(flavor = "multi_thread")]
async fn status_lists_pool_nodes_and_elected_gateway_nodes() {
    run(test_name!(), async |fixture| {
        fixture.put_two_pools().await?;
        let _controller = fixture.controller("one", &[]).await?;
        fixture.two_pools_are_ready().await?;
        let site = fixture.gateways.get("site").await?;
        let status = json!(site.status);
        assert_eq!(
            status["nodes"],
            json!([
                {"nodeName": "x-a", "privateIP": "10.1.0.2", "subnets": ["10.244.2.0/24", "fd00:244:2::/64"]},
                {"nodeName": "x-b", "privateIP": "10.1.0.3", "subnets": ["10.244.3.0/24", "fd00:244:3::/64"]},
            ])
        );
        assert_eq!((&status["nodeCount"], &status["observedGeneration"]), (&json!(2), &json!(site.metadata.generation)));
        let endpoint = |node: &str, type_: &str, port: u16, key: &str, on: &str| json!({"nodeName": node, "type": type_, "port": port, "underNAT": true, "config": {key: on}});
        let tunnel = endpoint("x-b", "tunnel", 4500, "enable-l3-tunnel", "true");
        let nodes: Api<Node> = Api::all(fixture.lab.cluster().client());
        let uid = nodes.get("x-a").await?.metadata.uid;
        let proxy = |on: &str| {
            let mut proxy = endpoint("x-a", "proxy", 10262, "enable-l7-proxy", on);
            proxy["config"]["node-uid"] = json!(uid);
            proxy
        };
        // Without endpoints of type proxy, every node is a candidate, ordered by name.
        assert_eq!(status["activeEndpoints"], json!([tunnel, proxy("true")]));
        let types: Vec<&str> = site.status.iter().flat_map(|s| &s.conditions).map(|c| c.type_.as_str()).collect();
        assert_eq!(types, ["Ready", "Elected", "Accepted"]);
        has_condition(&site, "Ready", "True", "Ready", "2 nodes in the pool, gateway: x-a, x-b")?;
        has_condition(&site, "Elected", "True", "Elected", "tunnel: x-b; proxy: x-a")?;
        has_condition(&site, "Accepted", "True", "Accepted", "in force")?;

        let managers = site.metadata.managed_fields.unwrap_or_default();
        let of_status: Vec<_> = managers.iter().filter(|m| m.subresource.as_deref() == Some("status")).map(|m| (m.manager.as_deref(), m.operation.as_deref())).collect();
        assert_eq!(of_status, [(Some("raven-controller"), Some("Apply"))]);
        let line = fixture.lab.cluster().kubectl(&["get", "gw", "site", "--no-headers"])?;
        assert_eq!(line.split_whitespace().take(5).collect::<Vec<_>>(), ["site", "2", "x-b", "True", "Ready"], "{line}");
        assert_eq!(fixture.event("site", "GatewayNodeElected", "tunnel: elected x-b").await?, "Normal");

        let configs: Api<ConfigMap> = Api::namespaced(fixture.lab.cluster().client(), "kube-system");
        let config = serde_json::from_value(json!({"metadata": {"name": "raven-cfg"}, "data": {"enable-l7-proxy": "false"}}))?;
        configs.create(&PostParams::default(), &config).await?;
        let switched = fixture.until("site", "has L7 switched off", |g| has_condition(g, "Ready", "True", "Ready", "ConfigMap raven-cfg sets enable-l7-proxy=false")).await?;
        assert_eq!(json!(switched.status)["activeEndpoints"], json!([tunnel, proxy("false")]));
        configs.delete("raven-cfg", &DeleteParams::default()).await?;
        fixture
            .until("site", "has L7 switched on again", |g| {
                let on = json!(g.status)["activeEndpoints"] == status["activeEndpoints"];
                ensure!(on, "the proxy is still switched off");
                Ok(())
            })
            .await?;
        Ok(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn elected_node_is_replaced_when_not_ready_and_kept_when_no_node_is_ready() {
    run(test_name!(), async |fixture| {
        let cluster = fixture.lab.cluster();
        fixture.put_two_pools().await?;
        let _controller = fixture.controller("one", &[]).await?;
        fixture.two_pools_are_ready().await?;
        elects(&fixture.gateways.get("site").await?, &["x-b"])?;
        let cloud = fixture.raw("cloud").await?;

        cluster.set_ready("x-b", false).await?;
        let replaced = fixture.until("site", "elects the other node", |g| elects(g, &["x-a"])).await?;
        has_condition(&replaced, "Ready", "True", "Ready", "")?;
        assert_eq!(nodes(&replaced), ["x-a", "x-b"], "the replaced node is still in the pool");
        assert_eq!(fixture.event("site", "GatewayNodeReplaced", "x-a replaces x-b (it is not Ready)").await?, "Normal");

        let before = fixture.raw("site").await?;
        cluster.set_ready("x-b", true).await?;
        fixture.fence().await?;
        assert_eq!(
            fixture.raw("site").await?,
            before,
            "the election must not change when the preferred node is ready again"
        );

        let elected = status(&fixture.gateways.get("site").await?);
        cluster.set_ready("x-b", false).await?;
        cluster.set_ready("x-a", false).await?;
        let none_ready = fixture
            .until("site", "reports that no node is ready", |g| {
                has_condition(g, "Elected", "False", "NoReadyNode", "keeping x-a, elected before")
            })
            .await?;
        has_condition(&none_ready, "Ready", "False", "NoReadyNode", "keeping x-a, elected before")?;
        assert_eq!(
            (status(&none_ready).active_endpoints, status(&none_ready).nodes),
            (elected.active_endpoints, elected.nodes)
        );
        assert_eq!(fixture.event("site", "NoReadyNode", "keeping x-a").await?, "Warning");

        cluster.set_ready("x-b", true).await?;
        let recovered = fixture.until("site", "elects the recovered node", |g| elects(g, &["x-b"])).await?;
        has_condition(&recovered, "Ready", "True", "Ready", "")?;
        assert_eq!(fixture.raw("cloud").await?, cloud, "the other Gateway must not change");
        Ok(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn leaving_node_loses_election_and_prefixes() {
    run(test_name!(), async |fixture| {
        fixture.put_two_pools().await?;
        let _controller = fixture.controller("one", &["--auto-gateways=false"]).await?;
        fixture.two_pools_are_ready().await?;
        let cloud = fixture.raw("cloud").await?;

        fixture.label("x-b", LABEL_GATEWAY, None).await?;
        let left = fixture.until("site", "elects another node than x-b", |g| elects(g, &["x-a"])).await?;
        assert_eq!((nodes(&left), status(&left).node_count), (vec!["x-a"], 1));
        has_condition(&left, "Accepted", "False", "EndpointNodeUnknown", "node x-b, which is not a node of this pool")?;
        assert_eq!(fixture.event("site", "GatewayNodeReplaced", "x-b (it left the pool of site)").await?, "Normal");

        fixture.lab.cluster().delete_node("x-a").await?;
        let empty = fixture
            .until("site", "has no node", |g| {
                has_condition(g, "Ready", "False", "NoNode", "label its nodes raven.openyurt.io/gateway=site")
            })
            .await?;
        assert_eq!((nodes(&empty).len(), status(&empty).active_endpoints.len(), status(&empty).node_count), (0, 0, 0));
        has_condition(&empty, "Accepted", "False", "EndpointNodeUnknown", "node x-a, which does not exist")?;
        assert_eq!(fixture.event("site", "GatewayNodeLost", "x-a (the node was deleted)").await?, "Warning");

        fixture.label("x-b", LABEL_GATEWAY, Some("site")).await?;
        let back = fixture.until("site", "elects x-b", |g| elects(g, &["x-b"])).await?;
        assert_eq!(status(&back).nodes[0].subnets, ["10.244.3.0/24", "fd00:244:3::/64"]);
        assert_eq!(fixture.raw("cloud").await?, cloud, "the other Gateway must not change");
        Ok(())
    })
    .await;
}
