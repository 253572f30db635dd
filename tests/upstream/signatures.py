"""The public signatures of upstream 0.4.2: facts, written down by hand. A star begins what is passed by keyword."""

from __future__ import annotations

SIGNATURES = {
    "ps.ParameterServer": "* rank world_size auto_pg gpu_count mem_fraction master_addr master_port",
    "ps.ParameterServer.get_metas": "",
    "ps.ParameterServer.load_metas": "metas",
    "ps.ParameterServer.register_checkpoint": (
        "checkpoint_name * files named_tensors use_shared_memory_pool use_inplace_pin_memory"
    ),
    "ps.ParameterServer.unregister_checkpoint": "checkpoint_name force",
    "ps.ParameterServer.gather_metas": "checkpoint_name",
    "ps.ParameterServer.init_process_group": "* timeout",
    "ps.ParameterServer.store_based_barrier": "timeout",
    "ps.ParameterServer.update": "checkpoint_name req_func * timeout ranks",
    "api.request_inference_to_update": "url socket_paths timeout uds",
    "worker.update_weights_from_ipc": "zmq_ctx zmq_handle device_id * run post_hook",
    "device_utils.DeviceManager": "",
    "device_utils.get_ip": "",
    "device_utils.npu_generate_uuid": "",
    "p2p_store.P2PStore": "device_manager",
    "p2p_store.P2PStore.register_named_tensors": "named_tensors",
    "p2p_store.P2PStore.unregister_named_tensors": "names",
    "p2p_store.P2PStore.batch_transfer_sync_read": "target_hostname buf_ptrs remote_ptrs lens",
    "data_types.ParameterMeta": "* name dtype shape aligned_size",
    "data_types.BucketRange": "idx offset size",
    "data_types.H2DBucket": "* size ranges items",
    "data_types.MemoryBufferMetas": "* metas ptr size",
    "data_types.MemoryBuffer": "* buffer size metas manually_pinned",
    "data_types.MemoryBufferMetaList": "* p2p_store_addr memory_buffer_metas_list rdma_device",
    "data_types.DataToGather": "* p2p_store_addr memory_buffer_metas_list rdma_device host_ip device_uuid",
    "distributed.use_backend": "backend",
    "distributed.init_process_group": "rank world_size store",
    "distributed.destroy_process_group": "group",
    "distributed.is_initialized": "",
    "distributed.all_gather_object": "object_list obj group",
    "distributed.all_reduce": "tensor op group",
    "distributed.broadcast": "tensor src group",
    "distributed.barrier": "group",
    "distributed.new_group": "ranks",
}
"""Name below the package -> its parameters."""

WORKER_EXTENSION = {"update_weights_from_ipc": "zmq_handles"}
"""Methods of `VllmColocateWorkerExtension`, which the vLLM plugin brings."""

ABSENT = (
    "api._init_api",
    "device_utils.has_efa_pci",
    "device_utils.DeviceManager.rdma_device",
    "device_utils.DeviceManager.transfer_engine_protocol",
    "distributed.Distributed",
    "ps._assign_receiver_ranks",
    "ps._gen_h2d_buckets",
)
"""Names that are not here."""
