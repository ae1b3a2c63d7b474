//! Keys and values of the tokens so far.

use super::{Cpu, Device, Done};
use crate::EngineError;
use bitstack_model::ModelConfig;

/// Keys and values of the tokens of one sequence so far, per layer, in a device's memory, with room for a fixed number of positions. Memory grows
/// as they come.
#[derive(Debug)]
pub struct KvCache<D: Device = Cpu> {
    layers: Vec<LayerCache<D>>,
    capacity: usize,
}

#[derive(Debug)]
struct LayerCache<D: Device> {
    /// Rotated keys, positions x `kv_size`.
    keys: D::Buffer,
    /// Positions x `kv_size`.
    values: D::Buffer,
    kv_size: usize,
    len: usize,
}

impl KvCache {
    /// Bytes of a cache for `positions` positions of a model, once all of them are in it.
    pub fn full_bytes(config: &ModelConfig, positions: usize) -> u64 {
        let per_position: usize = config.layers.iter().map(|layer| 2 * layer.attention.kv_size()).sum();
        size_of::<f32>() as u64 * per_position as u64 * positions as u64
    }
}

impl<D: Device> KvCache<D> {
    /// An empty cache for `capacity` positions of a model.
    ///
    /// # Errors
    /// [`EngineError::ContextFull`] when that is more than the model's limit.
    pub fn new(config: &ModelConfig, capacity: usize) -> Result<Self, EngineError> {
        if capacity > config.max_positions {
            return Err(EngineError::ContextFull { needed: capacity, limit: config.max_positions });
        }
        let empty = |kv_size| LayerCache { keys: D::Buffer::default(), values: D::Buffer::default(), kv_size, len: 0 };
        Ok(Self { layers: config.layers.iter().map(|layer| empty(layer.attention.kv_size())).collect(), capacity })
    }

    /// Positions in the cache.
    pub fn len(&self) -> usize {
        self.layers.last().map_or(0, |layer| layer.len)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes in memory: what is allocated for the positions so far, which grows ahead of them.
    pub fn len_bytes(&self) -> u64 {
        self.layers.iter().map(|layer| D::bytes(&layer.keys) + D::bytes(&layer.values)).sum()
    }

    /// Positions there is room for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets all positions from `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.layers.iter_mut().for_each(|layer| layer.len = layer.len.min(len));
    }

    /// Keys and values of a layer, each positions x kv size.
    ///
    /// # Panics
    /// When there is no such layer.
    pub fn layer(&self, layer: usize) -> (&D::Buffer, &D::Buffer) {
        (&self.layers[layer].keys, &self.layers[layer].values)
    }

    /// Positions of a layer: one that has run has more than those behind it.
    pub(crate) fn positions(&self, layer: usize) -> usize {
        self.layers[layer].len
    }

    /// Adds the rows from `first` on, `rows` of them, of `keys` and `values` to a layer.
    pub(crate) fn append(
        &mut self,
        queue: &mut D::Queue,
        layer: usize,
        [keys, values]: [&D::Buffer; 2],
        first: usize,
        rows: usize,
    ) -> Done {
        let capacity = self.capacity;
        let layer = &mut self.layers[layer];
        let (size, needed) = (layer.kv_size, layer.len + rows);
        let room = needed.next_power_of_two().min(capacity).max(needed);
        for (from, to) in [(keys, &mut layer.keys), (values, &mut layer.values)] {
            D::reserve(queue, to, room * size)?;
            D::copy(queue, from, first * size..(first + rows) * size, to, layer.len * size)?;
        }
        layer.len = needed;
        Ok(())
    }
}

impl<D: Device<Buffer: Clone>> Clone for KvCache<D> {
    fn clone(&self) -> Self {
        let layer = |layer: &LayerCache<D>| LayerCache {
            keys: layer.keys.clone(),
            values: layer.values.clone(),
            kv_size: layer.kv_size,
            len: layer.len,
        };
        Self { layers: self.layers.iter().map(layer).collect(), capacity: self.capacity }
    }
}
