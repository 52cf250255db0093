"""What is trained: one small file a method, over one layer and one method interface."""
