use crate::{Block, CoreError, Level, Shape};

/// The blocks of one weight, in order; each addition is checked against those before.
#[derive(Debug, Clone, PartialEq)]
pub struct WeightStack {
    shape: Shape,
    blocks: Vec<Block>,
}

impl WeightStack {
    /// An empty stack for a weight of this shape.
    pub fn new(shape: Shape) -> Self {
        Self { shape, blocks: Vec::new() }
    }

    /// Puts a block on top.
    ///
    /// # Errors
    /// When its shape or rank differs from the weight's, when the first block has no basis, or when it brings coefficients for a number
    /// of planes that is neither 1 nor its own number. The stack is then unchanged.
    pub fn push(&mut self, block: Block) -> Result<(), CoreError> {
        let first = self.blocks.first().map(|b| b.view().coefficients);
        block.view().check(self.shape, self.blocks.len() + 1, first)?;
        self.blocks.push(block);
        Ok(())
    }

    /// The weight's shape.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The rank of the blocks; `None` while there is no block.
    pub fn rank(&self) -> Option<usize> {
        self.blocks.first().map(|b| b.view().coefficients.rank())
    }

    /// The blocks, first to last.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// The highest level: the number of blocks.
    pub fn top_level(&self) -> u32 {
        // A stack of more blocks than that does not fit in memory.
        self.blocks.len() as u32
    }

    /// The blocks, taken out.
    pub fn into_blocks(self) -> Vec<Block> {
        self.blocks
    }

    /// Bytes of the first `level` blocks (all of them when there are fewer).
    pub fn bytes(&self, level: u32) -> u64 {
        // A block that exists in memory has a layout, and its bytes can be counted.
        self.blocks.iter().take(level as usize).filter_map(|b| b.view().layout().ok()?.bytes()).sum()
    }

    /// The weight as its first `level` blocks give it.
    ///
    /// # Errors
    /// [`CoreError::NoSuchLevel`] for 0 or more than there are blocks.
    pub fn level(&self, level: u32) -> Result<Level<'_>, CoreError> {
        match self.blocks.get(..level as usize) {
            Some(blocks) if level > 0 => Level::new(self.shape, blocks.iter().map(Block::view)),
            _ => Err(CoreError::NoSuchLevel { level, blocks: self.blocks.len() }),
        }
    }
}
